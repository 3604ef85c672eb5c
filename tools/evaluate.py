"""See bitnet_train.evaluation.cli."""

from bitnet_train.evaluation.cli import main

if __name__ == "__main__":
    main()
