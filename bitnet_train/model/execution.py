"""How a decoder is computed, as opposed to what it computes: options that change no number beyond rounding."""

from dataclasses import dataclass

from bitnet_train.errors import UserError
from bitnet_train.model.attention import BitNetAttention
from bitnet_train.model.bitlinear import keep_codes
from bitnet_train.model.decoder import BitNetDecoderLayer, BitNetForCausalLM

_CHOICES = {"attention": ("auto", "sdpa"), "activation_checkpointing": ("none", "selective", "full")}


@dataclass(frozen=True)
class Execution:
    """Options of the computation.

    Attributes:
        attention: auto: within documents alone where that is possible (by blocks on CPU, FlashAttention on CUDA);
            sdpa: torch's, with a mask. See `BitNetAttention.backend`.
        activation_checkpointing: what the backward pass computes again in place of keeping it: none, selective (the
            feed-forward block) or full (the whole layer). See `BitNetDecoderLayer.checkpointing`.
        compile: torch.compile of every decoder layer by itself; the first steps are slow.
        low_bit_gather: of sharded weights (trainer=fsdp) the ternary codes travel, not the masters; see
            `training.low_bit`.

    Raises:
        UserError: an option has another value.
    """

    attention: str = "auto"
    activation_checkpointing: str = "none"
    compile: bool = False
    low_bit_gather: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"execution.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def apply(self, model: BitNetForCausalLM, micro_batches: int = 1) -> None:
        """Sets a decoder up, in place.

        Args:
            model: the decoder.
            micro_batches: forward passes per update. With several, or where the backward pass repeats a forward pass,
                ternary codes are kept in between (not in compiled layers); `bitlinear.forget_codes` is due after every
                update.
        """
        for layer in model.model.layers:
            assert isinstance(layer, BitNetDecoderLayer)
            layer.checkpointing = self.activation_checkpointing
            if self.compile:
                layer.compile()
        for module in model.modules():
            if isinstance(module, BitNetAttention):
                module.backend = self.attention
        keep_codes(model, not self.compile and (micro_batches > 1 or self.activation_checkpointing != "none"))
