"""The folder in which this package keeps what can be made again: tokens of data, compiled code."""

import os
from pathlib import Path

from bitnet_train.errors import UserError


def user_cache() -> Path:
    """$XDG_CACHE_HOME/bitnet_train, or ~/.cache/bitnet_train where it is not set, or no absolute path (as XDG says).

    Raises:
        UserError: the user has no home folder.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / "bitnet_train"
    try:
        return Path.home() / ".cache" / "bitnet_train"
    except RuntimeError:
        raise UserError("the user has no home folder; set HOME, or XDG_CACHE_HOME, to an absolute path") from None
