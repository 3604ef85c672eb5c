"""Lightning without what torchmetrics would import beside it."""

import sys
from importlib import import_module

UNUSED = ("scipy", "transformers")  # a third of the CPU seconds that a start takes


def import_lightning() -> None:
    """Imports Lightning in the process of a command.

    Lightning imports torchmetrics, and that imports scipy and transformers where they are installed, for metrics that
    nobody computes here. It asks lightning_utilities what is installed, which denies these two meanwhile. Afterwards
    both can be imported as ever; of torchmetrics, only its packages lack the names that need them
    (`torchmetrics.text.bert.BERTScore` is there, `torchmetrics.text.BERTScore` is not).
    """
    if "torchmetrics" in sys.modules:
        return
    utilities = import_module("lightning_utilities.core.imports")
    installed = utilities.RequirementCache.__bool__

    def wanted(asked: object) -> bool:
        return not str(getattr(asked, "requirement", "")).startswith(UNUSED) and bool(installed(asked))

    absent = [name for name in UNUSED if name not in sys.modules]
    try:
        sys.modules |= dict.fromkeys(absent)  # type: ignore[arg-type]  # None: there is no such module
        utilities.RequirementCache.__bool__ = wanted
        import_module("lightning.pytorch")
    finally:
        utilities.RequirementCache.__bool__ = installed
        for name in absent:
            del sys.modules[name]
        utilities.package_available.cache_clear()
