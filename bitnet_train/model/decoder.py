"""The decoder: embedding, layers of attention and feed-forward on a residual stream, final norm, head.

    h <- h + attention(input_layernorm(h))
    h <- h + feed_forward(post_attention_layernorm(h))

Embedding and head are not quantised (BitNet b1.58 2B4T report, arXiv 2504.12285, section 2).
"""

from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitnet_train.model import varlen_attention
from bitnet_train.model.attention import BitNetAttention, Documents, KVCache, LayerCache
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.feed_forward import BitNetMLP
from bitnet_train.model.norm import RMSNorm
from bitnet_train.model.rope import Rotation, rotation


class BitNetDecoderLayer(nn.Module):
    """One layer on the residual stream `(batch, seq, hidden)`.

    Attributes:
        checkpointing: what the backward pass computes again instead of keeping it: "none"; "selective", the
            feed-forward block, which holds most of the activations and has no attention; "full", the whole layer.
    """

    checkpointing = "none"

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        self.self_attn = BitNetAttention(config)
        self.mlp = BitNetMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h: Tensor, by: Rotation, documents: Documents | None, cache: LayerCache | None = None) -> Tensor:
        """The stream after both blocks; an absent `documents` is one document per row."""
        recompute = self.checkpointing if torch.is_grad_enabled() and cache is None else "none"
        if recompute == "full":
            return checkpointed(self._blocks, h, by, documents, None, "none")
        return self._blocks(h, by, documents, cache, recompute)

    def _blocks(
        self, h: Tensor, by: Rotation, documents: Documents | None, cache: LayerCache | None, recompute: str
    ) -> Tensor:
        h = self.self_attn(h, self.input_layernorm, by, documents, cache)
        if recompute == "selective":
            return checkpointed(self.mlp, h, self.post_attention_layernorm)
        output: Tensor = self.mlp(h, self.post_attention_layernorm)
        return output


def checkpointed(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """function(*arguments), computed again in the backward pass."""
    output: Tensor = checkpoint(function, *arguments, use_reentrant=False)
    return output


class BitNetModel(nn.Module):
    """Token ids or embeddings to the normalised last hidden states."""

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BitNetDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The hidden states after the final norm, float32 `(batch, seq, hidden)`.

        Args:
            input_ids: int64 `(batch, seq)`; or `inputs_embeds`, `(batch, seq, hidden)`, in their place.
            position_ids: int64 `(batch, seq)`; from 0, or from the end of the cache, where absent.
            document_ids: int64 `(batch, seq)`: a run of equal numbers is a document, which sees itself alone. Absent:
                each row is one document.
            cache: keys and values of earlier positions, extended by this call. With a cache that holds positions
                already, seq must be 1.
        """
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            start = cache.length if cache is not None else 0
            position_ids = torch.arange(start, start + h.shape[1], device=h.device)[None]
        config = self.config
        by = rotation(position_ids, config.head_dim, config.rope_theta, config.rope_scaling)
        documents = Documents(document_ids) if document_ids is not None else None
        if documents is not None and varlen_attention.is_for(h, config.head_dim):
            documents.measure()  # here: a compiled layer cannot wait for it
        for index, layer in enumerate(self.layers):
            h = layer(h, by, documents, cache.layer(index) if cache is not None else None)
        output: Tensor = self.norm(h)
        return output


class Inputs(TypedDict, total=False):
    """What `BitNetModel.forward` takes by name."""

    inputs_embeds: Tensor | None
    position_ids: Tensor | None
    document_ids: Tensor | None
    cache: KVCache | None


class BitNetForCausalLM(nn.Module):
    """The decoder with its head; `lm_head` is absent where the embedding serves as head (tie_word_embeddings)."""

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        self.config = config
        self.model = BitNetModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialize(self)

    @property
    def head_weight(self) -> Tensor:
        """The matrix of the head, `(vocab, hidden)`."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor | None = None, *, logits_to_keep: int = 0, **inputs: Unpack[Inputs]) -> Tensor:
        """Logits `(batch, seq, vocab)`, or of the last `logits_to_keep` positions only; see `BitNetModel.forward`."""
        h = self.model(input_ids, **inputs)
        return nn.functional.linear(h[:, -logits_to_keep:], self.head_weight)


def initialize(model: nn.Module) -> None:
    """All initialisation:

    | parameter | value |
    |---|---|
    | embedding, head, every linear weight | normal(0, initializer_range) |
    | biases | 0 |
    | norm gains | 1 (set where RMSNorm is made) |
    """
    assert isinstance(model.config, BitNetConfig)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=model.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
