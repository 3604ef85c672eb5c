"""The reference of DPO: log-probabilities of all pairs under the initial model, computed once and kept in a file.

    CACHE_DIR/reference-<weights>-<pairs>.safetensors    "logps", float32 (2, pairs)

The name and the file's own header carry the hash of the weights, with the model's shape and precision, and the hash of
the pairs' ids and masks. Ids come out of the data, the tokenizer and the chat template: if any of them changes, the
name is another one, and a file whose header says something else is computed again. Several ranks deal the batches out.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitnet_train.data.batches import PairBatch, TokenBatch
from bitnet_train.data.packing import PairRows
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.labels import IGNORE_INDEX
from bitnet_train.losses.tokens import token_logps
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.stages.base import ALONE, Ranks

Precision = Callable[[], AbstractContextManager[None]]


def completion_logps(model: BitNetForCausalLM, tokens: TokenBatch) -> Tensor:
    """Log-probability of every completion in nats, float32 `(2, pairs)`: the chosen ones, then the rejected ones."""
    hidden = model.model(tokens.input_ids, position_ids=tokens.position_ids, document_ids=tokens.document_ids)
    return token_logps(hidden, model.head_weight, tokens.labels).sum(dim=-1).view(2, -1)


def completion_lengths(tokens: TokenBatch) -> Tensor:
    """Tokens of every completion, int64 `(2, pairs)`."""
    return (tokens.labels != IGNORE_INDEX).sum(dim=-1).view(2, -1)


@torch.no_grad()
def reference_logps(model: BitNetForCausalLM, pairs: PairRows, batch_size: int = 8, ranks: Ranks = ALONE) -> Tensor:
    """`completion_logps` of all pairs, without dropout: float32 `(2, len(pairs))` on the CPU, the same on all ranks."""
    device, was_training = model.head_weight.device, model.training
    model.eval()
    logps = torch.zeros(2, len(pairs))
    by_length = pairs.lengths.argsort(kind="stable").tolist()
    batches = [by_length[first : first + batch_size] for first in range(0, len(pairs), batch_size)]
    for first in range(0, len(batches), ranks.count):
        turn = first + ranks.rank
        numbers = batches[min(turn, len(batches) - 1)]  # ranks without a batch run along: a sharded model needs them
        batch: PairBatch = pairs.collate([pairs[i] for i in numbers])
        scored = completion_logps(model, TokenBatch(*(field.to(device) for field in batch.tokens))).cpu()
        if turn < len(batches):
            logps[:, numbers] = scored
    model.train(was_training)
    return ranks.sum(logps)


def cached_reference_logps(
    model: BitNetForCausalLM,
    weights: str,
    pairs: PairRows,
    cache_dir: Path,
    precision: Precision,
    ranks: Ranks = ALONE,
) -> Tensor:
    """`reference_logps`, read from the cache where every rank has them there; `weights` is the model's `model_hash`."""
    file = cache_dir / f"reference-{weights[:16]}-{pairs.fingerprint[:16]}.safetensors"
    key = {"weights": weights, "pairs": pairs.fingerprint}
    logps = _read(file, key, (2, len(pairs)))
    everywhere = int(ranks.sum(torch.tensor(int(logps is not None)))) == ranks.count
    if logps is None or not everywhere:
        with precision():
            logps = ranks.gathered(lambda: reference_logps(model, pairs, ranks=ranks))
        if ranks.rank == 0:
            with atomic_file(file) as temporary:
                save_file({"logps": logps}, temporary, metadata=key)
    return logps


def _read(file: Path, key: dict[str, str], shape: tuple[int, int]) -> Tensor | None:
    """What the file holds, if it is whole and of this key."""
    try:
        with safe_open(file, framework="pt") as tensors:
            logps: Tensor = tensors.get_tensor("logps")
            return logps if tensors.metadata() == key and tuple(logps.shape) == shape else None
    except (OSError, SafetensorError):
        return None


def model_hash(model: BitNetForCausalLM, precision: Precision, ranks: Ranks = ALONE) -> str:
    """Of all that decides about a log-probability: shape, weights, and whether products run in bfloat16."""
    with precision():
        autocast = torch.is_autocast_enabled(model.head_weight.device.type)
    digest = hashlib.sha256(f"{model.config} {autocast}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(ranks.whole(tensor.detach()).cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
