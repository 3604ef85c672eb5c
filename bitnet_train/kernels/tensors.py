"""Which tensors a pass that knows nothing of torch can work on."""

from collections.abc import Container, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

FLOATS = (torch.float32, torch.bfloat16)


def ordinary(tensors: Iterable[Tensor | None], device: str, dtypes: Container[torch.dtype] = FLOATS) -> bool:
    """True where those that are there have memory on `device`, and one of the dtypes, outside a compiled graph.

    A fake or sharded tensor, or another subclass, has none of its own.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    return not torch.compiler.is_compiling() and all(
        type(tensor) in (Tensor, Parameter) and tensor.device.type == device and tensor.dtype in dtypes
        for tensor in present
    )


def rows_of_heads(x: Tensor) -> Tensor:
    """`(batch, heads, seq, head_dim)` as `(batch, seq, heads, head_dim)`: heads side by side, tokens equally far apart.

    A view where x is a part of a projection's rows, which it mostly is.
    """
    rows = x.transpose(1, 2)
    batch, token, head, feature = rows.stride()
    regular = (head, feature) == (rows.shape[3], 1) and (len(rows) == 1 or batch == rows.shape[1] * token)
    # Not contiguous(), which returns a tensor with an axis of one as it is, whatever that axis' stride.
    return rows if regular else rows.clone(memory_format=torch.contiguous_format)
