"""Writes a trained model as packed safetensors, GGUF or master weights; see --help."""

from bitnet_train.export import main

if __name__ == "__main__":
    main()
