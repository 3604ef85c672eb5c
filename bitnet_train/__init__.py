"""bitnet_train: train, fine-tune, align and export BitNet b1.58 language models (ternary weights, int8 activations)."""

__version__ = "0.1.0"
