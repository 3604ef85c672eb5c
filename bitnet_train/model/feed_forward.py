"""The gated feed-forward block with BitNet's sub-norm: h + down(ffn_sub_norm(act(gate(x)) * up(x))), x = norm(h)."""

import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.model.bitlinear import fused_linear, fusible, linear
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.norm import RMSNorm


class BitNetMLP(nn.Module):
    """The residual stream `(batch, seq, hidden)`; act is relu(x)^2 (2B4T) or silu (BitNet b1.58 of 2024)."""

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        self.hidden_act = config.hidden_act
        self.gate_proj = linear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size)
        self.ffn_sub_norm = RMSNorm(config.intermediate_size, config.rms_norm_eps)

    def forward(self, h: Tensor, norm: RMSNorm) -> Tensor:
        """The stream after this block; `norm` is the layer's norm before it."""
        if fusible(self.gate_proj, self.up_proj, self.down_proj):
            gate_up = fused_linear(h, (self.gate_proj, self.up_proj), norm)
            return fused_linear(gate_up, (self.down_proj,), self.ffn_sub_norm, self.hidden_act, residual=h)
        x = norm(h)
        gate = self.gate_proj(x)
        gate = F.relu(gate).square() if self.hidden_act == "relu2" else F.silu(gate)
        output: Tensor = h + self.down_proj(self.ffn_sub_norm(gate * self.up_proj(x)))
        return output
