"""`python -m bitnet_train +recipe=NAME [overrides]`."""

from bitnet_train.cli import main

if __name__ == "__main__":
    main()
