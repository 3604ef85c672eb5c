"""Causal attention with grouped keys and values, over rows that may hold several documents, with an optional cache.

h + o_proj(attn_sub_norm(softmax(q k^T / sqrt(head_dim)) v)) with q, k, v of x = norm(h), q and k turned by position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.model import varlen_attention
from bitnet_train.model.bitlinear import fused_linear, fusible, linear
from bitnet_train.model.block_attention import available as block_attention_available
from bitnet_train.model.block_attention import block_attention
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.norm import RMSNorm
from bitnet_train.model.rope import Rotation, rotate


@dataclass
class LayerCache:
    """Keys and values of the positions seen so far, each `(batch, kv_heads, seen, head_dim)`."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new positions and returns all of them."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values


@dataclass
class KVCache:
    """One `LayerCache` per decoder layer, made as the layers ask for it."""

    layers: dict[int, LayerCache] = field(default_factory=dict)

    def layer(self, index: int) -> LayerCache:
        """The cache of decoder layer `index`."""
        return self.layers.setdefault(index, LayerCache())

    @property
    def length(self) -> int:
        """Positions seen so far."""
        keys = self.layers[0].keys if self.layers else None
        return 0 if keys is None else keys.shape[2]


class Documents:
    """What a token sees in a row that holds several documents: its own document, up to itself.

    Attributes:
        starts: int64 `(batch, seq)`, the first position of the document that each position belongs to.
        lengths: for `varlen_attention`, once `measure` was called: where documents begin in the rows laid end to end,
            and their end, int32, and the tokens of the longest one.
    """

    lengths: tuple[Tensor, int] | None = None

    def __init__(self, document_ids: Tensor) -> None:
        """A run of equal numbers in `document_ids` (batch, seq) is a document."""
        positions = torch.arange(document_ids.shape[1], device=document_ids.device)
        changes = document_ids.diff(dim=1, prepend=document_ids[:, :1]) != 0
        self.starts = (positions * changes).cummax(dim=1).values
        self._mask: Tensor | None = None

    def measure(self) -> tuple[Tensor, int]:
        """Fills in `lengths`, of at least one position. The host waits for the device, once."""
        starts = self.starts.cpu()
        begins = (starts == torch.arange(starts.shape[1], device="cpu")).flatten().nonzero()[:, 0]
        boundaries = F.pad(begins, (0, 1), value=starts.numel()).int()
        self.lengths = boundaries.to(self.starts.device, non_blocking=True), int(boundaries.diff().max())
        return self.lengths

    @property
    def mask(self) -> Tensor:
        """True where a query sees a key: bool `(batch, 1, seq, seq)`. Kept, without the lock of `cached_property`."""
        if self._mask is None:
            positions = torch.arange(self.starts.shape[1], device=self.starts.device)
            seen = (positions >= self.starts[:, :, None]) & (positions <= positions[:, None])
            self._mask = seen[:, None]
        return self._mask


class BitNetAttention(nn.Module):
    """The residual stream `(batch, seq, hidden)` to the same.

    Attributes:
        backend: "sdpa" is torch's attention with a mask over documents; "auto" takes `block_attention` on CPU and
            `varlen_attention` on CUDA where it can.
    """

    backend = "auto"

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.attention_dropout
        kv_size = config.num_key_value_heads * config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = linear(config, config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = linear(config, config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = linear(config, config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = linear(config, config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.attn_sub_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        """`(batch, seq, heads * head_dim)` to `(batch, heads, seq, head_dim)`."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)

    def _project(self, h: Tensor, norm: RMSNorm) -> Sequence[Tensor]:
        """Queries, keys and values, `(batch, seq, heads * head_dim)` each."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if fusible(*layers):
            return torch.split(fused_linear(h, layers, norm), [layer.out_features for layer in layers], dim=-1)
        x = norm(h)
        return [layer(x) for layer in layers]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """`(batch, heads, seq, head_dim)`, keys and values with fewer heads, to `(batch, seq, hidden)`."""
        dropout = self.dropout if self.training else 0.0
        whole = self.backend != "sdpa" and k.shape[2] == q.shape[2] > 1 and not dropout
        if whole and block_attention_available(q):
            starts = q.new_zeros(q.shape[0], q.shape[2], dtype=torch.int64) if documents is None else documents.starts
            attended = block_attention(q, k, v, starts)
        elif whole and documents and documents.lengths and varlen_attention.fits(self.head_dim, q.dtype):
            attended = varlen_attention.varlen_attention(q, k, v, *documents.lengths)
        else:
            attended = F.scaled_dot_product_attention(
                q,
                k.repeat_interleave(self.groups, dim=1),
                v.repeat_interleave(self.groups, dim=1),
                attn_mask=None if documents is None else documents.mask,
                dropout_p=dropout,
                is_causal=documents is None and q.shape[2] > 1,
            )
        return attended.transpose(1, 2).flatten(2)

    def forward(
        self, h: Tensor, norm: RMSNorm, by: Rotation, documents: Documents | None, cache: LayerCache | None = None
    ) -> Tensor:
        """The stream after this block; `norm` is the layer's norm before it."""
        q, k, v = map(self._heads, self._project(h, norm))
        q, k = rotate(q, by), rotate(k, by)
        if cache is not None:
            k, v = cache.extend(k, v)
        attended = self._attend(q, k, v, documents)
        if fusible(self.o_proj):
            return fused_linear(attended, (self.o_proj,), self.attn_sub_norm, residual=h)
        output: Tensor = h + self.o_proj(self.attn_sub_norm(attended))
        return output
