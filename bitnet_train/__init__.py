"""bitnet_train: train, fine-tune, align and export BitNet b1.58 language models (ternary weights, int8 activations)."""

import os

__version__ = "0.1.0"

# How often a thread of GNU's OpenMP looks whether the others are done before it sleeps: mostly, until the next loop
# begins. By itself it looks 300,000 times, some milliseconds, and where another program has the core of one thread, all
# spin for that one (tools/benchmark_waiting.py). Read when torch is loaded, which must come after this.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
