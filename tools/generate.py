"""See bitnet_train.generate.cli."""

from bitnet_train.generate.cli import main

if __name__ == "__main__":
    main()
