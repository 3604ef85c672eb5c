"""The gated feed-forward block with BitNet's sub-norm: down(ffn_sub_norm(act(gate(x)) * up(x)))."""

import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.model.bitlinear import linear, project
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.norm import RMSNorm


class BitNetMLP(nn.Module):
    """`(batch, seq, hidden)` to `(batch, seq, hidden)`; act is relu(x)^2 (2B4T) or silu (BitNet b1.58 of 2024)."""

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        self.relu2 = config.hidden_act == "relu2"
        self.gate_proj = linear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size)
        self.ffn_sub_norm = RMSNorm(config.intermediate_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, (self.gate_proj, self.up_proj))
        gate = F.relu(gate).square() if self.relu2 else F.silu(gate)
        output: Tensor = self.down_proj(self.ffn_sub_norm(gate * up))
        return output
