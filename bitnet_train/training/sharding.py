"""FSDP2 (Zhao et al., arXiv 2304.11277; torch's fully_shard): every rank keeps its rows of every tensor.

Weights, gradients and optimizer state lie on the ranks as DTensors, cut along their first dimension. A decoder layer is
gathered in front of its forward pass and of its backward pass, and freed behind them; embedding, final norm and head
belong to the root and stay for the whole step. The gather moves float32 masters: a layer sees the weights of one
process, so that its codes and scales are the same (a bfloat16 gather would change some).
"""

import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from bitnet_train.model.bitlinear import keep_codes
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.quant import absmean_of, row_sums
from bitnet_train.training import ranks


def strategy() -> ModelParallelStrategy:
    """Lightning's strategy for modules that shard themselves in configure_model, with all ranks in one mesh."""
    return ModelParallelStrategy(data_parallel_size=ranks.count(), tensor_parallel_size=1)


def shard(root: nn.Module, model: BitNetForCausalLM, mesh: DeviceMesh, entries: Iterable[str]) -> None:
    """Cuts the decoder over the ranks of a mesh, in place.

    Args:
        root: the module whose methods run the decoder.
        model: the decoder inside it; of its matrices a rank needs the rows that it is going to keep.
        mesh: one dimension, all ranks.
        entries: the names of these methods: the root's own weights are gathered while one of them runs.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # nobody writes into it
    keep_codes(model, False)  # kept codes would be whole matrices
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    for name in entries:
        register_fsdp_forward_method(root, name)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was called for this root."""
    return isinstance(module, FSDPModule)


def own_part(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that lie on this rank, sharing its memory; a tensor that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_shard(part: Tensor, like: Tensor) -> Tensor:
    """A matrix of which every rank has made the rows that it keeps of `like`; the part itself if that is whole."""
    if not isinstance(like, DTensor):
        return part
    shape = (len(like), *part.shape[1:])
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """The mesh over which a module's weights are sharded, if they are."""
    weight = next(iter(module.state_dict().values()))
    return weight.device_mesh if isinstance(weight, DTensor) else None


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor, on every rank; all of them call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(length: int, rank: int, count: int) -> range:
    """The rows that one of `count` ranks keeps, by number: all but the last keep equally many, some of those none."""
    most = -(-length // count)
    return range(min(rank * most, length), min((rank + 1) * most, length))


def rows_of(tensor: DTensor, rank: int) -> range:
    """The numbers of the rows of a sharded tensor that a rank keeps."""
    return share(len(tensor), rank, tensor.device_mesh.size())


def total(value: Tensor, like: Tensor) -> Tensor:
    """The sum of every rank's value, where `like` is sharded; the value itself where it is not."""
    if isinstance(like, DTensor):
        dist.all_reduce(value, group=like.device_mesh.get_group())
    return value


def absmeans(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """`quant.absmean` of every weight, to the bit, in one all-reduce where they are sharded; float32, shape () each.

    A row lies on one rank. Every rank puts the sums of its rows into their places among zeros, so that the all-reduce
    adds nothing but zeros to them, and all ranks add up the same numbers in the same order as a single process.
    """
    rows = [torch.zeros(len(weight), dtype=torch.float64, device=weight.device) for weight in weights]
    for weight, places in zip(weights, rows, strict=True):
        first = rows_of(weight, weight.device_mesh.get_local_rank()).start if isinstance(weight, DTensor) else 0
        sums = row_sums(own_part(weight))
        places[first : first + len(sums)] = sums
    if not weights:
        return []
    whole_rows = total(torch.cat(rows), like=weights[0]).split([len(weight) for weight in weights])
    return [absmean_of(own, weight.numel()) for own, weight in zip(whole_rows, weights, strict=True)]
