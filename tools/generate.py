"""See bitnet_train.generate."""

from bitnet_train.generate import main

if __name__ == "__main__":
    main()
