"""All that the commands import, imported as they do it."""

from importlib import import_module

from bitnet_train.training.imports import import_lightning

import_lightning()
for name in ("cli", "training.run", "export", "evaluation", "generate"):
    import_module(f"bitnet_train.{name}")
