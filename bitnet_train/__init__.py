"""bitnet_train: train, fine-tune, align and export BitNet b1.58 language models (ternary weights, int8 activations)."""

import os

__version__ = "0.1.0"

# A thread of OpenMP that waits for the others sleeps. It would spin for milliseconds, and where another program has the
# core of one of them, all spin for that one. Read when torch is loaded, which must come after this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
