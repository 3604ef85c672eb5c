"""Losses over preference pairs, as sums over the pairs.

dpo_sigmoid      - sum_i log sigmoid(beta ((log pi_c - log ref_c) - (log pi_r - log ref_r)))
"""

import torch.nn.functional as F
from torch import Tensor


def dpo_sigmoid_sum(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """-sum log sigmoid(beta (chosen - rejected)), Rafailov et al. (arXiv 2305.18290, equation 7).

    Args:
        chosen_logratios: `(pairs,)`, log pi(chosen) - log ref(chosen), each summed over the completion's tokens.
        rejected_logratios: the same for the rejected completions.
        beta: strength of the pull towards the reference.
    """
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios)).sum()
