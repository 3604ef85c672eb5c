"""Autocast, as functions with a gradient of their own meet it.

Such a function asks once for its compute dtype and then says the dtype of every product itself: its forward and its
backward pass run without autocast, also where a caller runs `loss.backward()` under it.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with x: autocast's where it is on, else that of x."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of x; some, such as meta, never have it."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
