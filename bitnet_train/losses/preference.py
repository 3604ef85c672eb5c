"""Losses over preference pairs, one value per pair.

With c = log pi(chosen) - log ref(chosen), r the same of the rejected completion, each summed over the completion's
tokens, d = c - r, n the number of tokens of a completion, S the sigmoid, and e the label smoothing:

    sigmoid        - (1 - e) log S(beta d) - e log S(-beta d)             DPO, arXiv 2305.18290, equation 7; e: cDPO
    robust         (- (1 - e) log S(beta d) + e log S(-beta d)) / (1 - 2e)     arXiv 2403.00409, equation 14
    hinge          max(0, 1 - beta d)                                     SLiC, arXiv 2305.10425
    ipo            (c / n_c - r / n_r - 1 / (2 beta))^2                   arXiv 2310.12036, equation 17, per token
    apo_zero       (1 - S(beta c)) + S(beta r)                            arXiv 2408.06266, equation 7
    apo_down       S(beta c) + (1 - S(beta d))                            arXiv 2408.06266, equation 8
    sigmoid_norm   sigmoid of c / n_c - r / n_r                           Tulu 3, arXiv 2411.15124, section 5.1

Without a reference, with p = log pi / n, the mean per token:

    simpo          sigmoid of p_c - p_r - gamma / beta                    arXiv 2405.14734, equation 6
    orpo           - p_c - beta log S(log odds_c - log odds_r)            arXiv 2403.07691, equations 6 and 7
                   with odds = exp(p) / (1 - exp(p))

`sft_term` adds - p_c to any of them (RPO, arXiv 2404.19733, equation 1).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairScores(NamedTuple):
    """What a loss sees of a batch of pairs, float32 `(pairs,)` each, in nats.

    `chosen` and `rejected` are log-probabilities of the completions, those of the reference subtracted if there is one;
    the lengths are in tokens.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    def relative_to(self, reference: Tensor) -> "PairScores":
        """The same with the reference's log-probabilities `(2, pairs)` subtracted."""
        return self._replace(chosen=self.chosen - reference[0], rejected=self.rejected - reference[1])

    def per_token(self) -> "PairScores":
        """The same with means in place of sums over the tokens."""
        chosen, rejected = self.chosen / self.chosen_length, self.rejected / self.rejected_length
        return self._replace(chosen=chosen, rejected=rejected)


class LossOptions(NamedTuple):
    """`beta` scales a score; `smoothing` is the share of pairs assumed to be labelled the wrong way round."""

    beta: float
    smoothing: float = 0.0
    gamma: float = 0.0


PairLoss = Callable[[PairScores, LossOptions], Tensor]


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """- (1 - e) log S(x) - e log S(-x)."""
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def sigmoid(scores: PairScores, options: LossOptions) -> Tensor:
    """DPO, conservative where labels are smoothed; see the module's text, as for all others."""
    return _smoothed(options.beta * (scores.chosen - scores.rejected), options.smoothing)


def robust(scores: PairScores, options: LossOptions) -> Tensor:
    """DPO's loss without the bias that flipped labels give it."""
    logits, e = options.beta * (scores.chosen - scores.rejected), options.smoothing
    return (e * F.logsigmoid(-logits) - (1 - e) * F.logsigmoid(logits)) / (1 - 2 * e)


def hinge(scores: PairScores, options: LossOptions) -> Tensor:
    """Nothing for a pair that lies 1 / beta apart."""
    return F.relu(1 - options.beta * (scores.chosen - scores.rejected))


def ipo(scores: PairScores, options: LossOptions) -> Tensor:
    """Pulls the difference of the means per token to 1 / (2 beta)."""
    mean = scores.per_token()
    return (mean.chosen - mean.rejected - 1 / (2 * options.beta)).square()


def apo_zero(scores: PairScores, options: LossOptions) -> Tensor:
    """Chosen up, rejected down: for chosen answers that are better than the model's own."""
    return 1 - torch.sigmoid(options.beta * scores.chosen) + torch.sigmoid(options.beta * scores.rejected)


def apo_down(scores: PairScores, options: LossOptions) -> Tensor:
    """Both down, rejected more: for chosen answers that are worse than the model's own."""
    apart = torch.sigmoid(options.beta * (scores.chosen - scores.rejected))
    return torch.sigmoid(options.beta * scores.chosen) + 1 - apart


def sigmoid_norm(scores: PairScores, options: LossOptions) -> Tensor:
    """DPO with means per token."""
    return sigmoid(scores.per_token(), options)


def simpo(scores: PairScores, options: LossOptions) -> Tensor:
    """Means per token, a margin of gamma, no reference."""
    mean = scores.per_token()
    return _smoothed(options.beta * (mean.chosen - mean.rejected) - options.gamma, options.smoothing)


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of a log-probability below 0."""
    return logp - torch.log(-torch.expm1(logp))


def orpo(scores: PairScores, options: LossOptions) -> Tensor:
    """Likelihood of the chosen completion, and the odds ratio; no reference."""
    mean = scores.per_token()
    return sft_term(scores) - options.beta * F.logsigmoid(log_odds(mean.chosen) - log_odds(mean.rejected))


def sft_term(policy: PairScores) -> Tensor:
    """Negative log-likelihood per token of the chosen completions; `policy` has no reference subtracted."""
    return -policy.chosen / policy.chosen_length


WITH_REFERENCE: dict[str, PairLoss] = {
    loss.__name__: loss for loss in (sigmoid, robust, hinge, ipo, apo_zero, apo_down, sigmoid_norm)
}
WITHOUT_REFERENCE: dict[str, PairLoss] = {loss.__name__: loss for loss in (simpo, orpo)}
