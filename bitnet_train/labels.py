"""What data and losses agree on about labels: the id that a position predicts, or no id."""

IGNORE_INDEX = -100  # carries no loss, as in torch and transformers
