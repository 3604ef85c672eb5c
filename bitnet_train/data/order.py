"""Which sample stands at position p of the run: a pure function of (seed, p, number of samples). No buffer, no state.

    epoch = p // n      i = p % n      sample = permutation(seed, epoch)(i)

The permutation is a balanced Feistel network over the smallest domain 4^b >= n, walked until it lands below n: it
needs no memory, so that it works for any number of samples, and every rank and worker computes the same. (Black and
Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, the cycle-walking and Feistel constructions; round
function: splitmix64's finaliser.)
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

_MASK64 = (1 << 64) - 1
_ROUNDS = 4


def mix64(x: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): 64 bits in, 64 well mixed bits out."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def permuted(index: int, count: int, key: int) -> int:
    """The image of `index` under the key's permutation of range(count)."""
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    value = index
    while True:
        left, right = value >> half_bits, value & mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (mix64(mix64(key + round_number) ^ right) & mask)
        value = left << half_bits | right
        if value < count:
            return value


def sample_at(position: int, count: int, seed: int) -> int:
    """The sample at a position of the run: epochs follow each other, each in an order of its own."""
    epoch, index = divmod(position, count)
    return permuted(index, count, mix64(mix64(seed) ^ epoch))


class BlockOrder:
    """The sample at a position where neighbours are cheap to read together: blocks of samples are shuffled, then dealt.

    All samples stand in a line: the blocks in an order of the epoch's own, and within each block its samples in one of
    their own. The line is cut into `lanes` of equal length, one sample more or less, and position i of the epoch is the
    next sample of lane i % lanes. Every sample comes once per epoch, and a lane reads its blocks one after the other.

    Args:
        counts: int64 `(blocks,)`, samples of each block, which are numbered through.
    """

    def __init__(self, counts: np.ndarray, lanes: int, seed: int) -> None:
        self.counts, self.lanes, self.seed = counts, lanes, seed
        self._first, self._total = np.cumsum(counts) - counts, int(counts.sum())
        self._epoch, self._blocks, self._ends = -1, counts, counts

    def __call__(self, position: int) -> int:
        """The sample."""
        epoch, index = divmod(position, self._total)
        key = mix64(mix64(self.seed) ^ epoch)
        self._shuffle(epoch, key)
        place = self._place(index)
        number = int(np.searchsorted(self._ends, place, side="right"))
        block = int(self._blocks[number])
        within, count = place - int(self._ends[number] - self.counts[block]), int(self.counts[block])
        return int(self._first[block]) + permuted(within, count, mix64(key ^ block))

    def _shuffle(self, epoch: int, key: int) -> None:
        """The order of blocks: that of Philox' raw numbers, which are the same in every version of numpy (NEP 19)."""
        if epoch != self._epoch:
            self._blocks = np.random.Philox(key=key).random_raw(len(self.counts)).argsort(kind="stable")
            self._ends = np.cumsum(self.counts[self._blocks])
            self._epoch = epoch

    def _place(self, index: int) -> int:
        """Where in the line position `index` of an epoch stands; the first lanes are one sample longer."""
        depth, lane = divmod(index, self.lanes)
        length, longer = divmod(self._total, self.lanes)
        return lane * length + min(lane, longer) + depth


class MicroBatches:
    """The micro-batches of one rank, from an optimizer step on to the end of the run: a batch sampler.

    In every optimizer step, micro-batch m of rank r reads the positions
    step * G + (m * ranks + r) * B + [0, B), with G = global_batch_size and B = micro_batch_size: the ranks together
    read the same samples in the same order, however many they are.

    Attributes:
        first_step: the optimizer step to start from; set before a resumed run iterates.
        sample_at: the sample at a position; `sample_at` of this module unless set.
        lengths: tokens of every sample; the samples of an optimizer step are then read longest first, so that those of
            a micro-batch need little padding. The step's gradient is a sum over all of them and stays the same.
    """

    def __init__(
        self, count: int, seed: int, global_batch_size: int, micro_batch_size: int, steps: int, rank: int, ranks: int
    ) -> None:
        self.count, self.seed = count, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.steps, self.rank, self.ranks = steps, rank, ranks
        self.first_step = 0
        self.sample_at: Callable[[int], int] = partial(sample_at, count=count, seed=seed)
        self.lengths: np.ndarray | None = None

    @property
    def per_step(self) -> int:
        """Micro-batches that one rank contributes to an optimizer step (gradient accumulation)."""
        return self.global_batch_size // (self.micro_batch_size * self.ranks)

    def __len__(self) -> int:
        """Micro-batches from `first_step` to the end."""
        return (self.steps - self.first_step) * self.per_step

    def samples(self, step: int) -> list[int]:
        """The samples of an optimizer step over all ranks, in the order of their positions."""
        start = step * self.global_batch_size
        found = [self.sample_at(start + i) for i in range(self.global_batch_size)]
        lengths = self.lengths
        return found if lengths is None else sorted(found, key=lambda sample: -int(lengths[sample]))

    def micro_batch(self, step: int, number: int) -> list[int]:
        """The samples of this rank's micro-batch `number` of an optimizer step."""
        start = (number * self.ranks + self.rank) * self.micro_batch_size
        return self.samples(step)[start : start + self.micro_batch_size]

    def __iter__(self) -> Iterator[list[int]]:
        size = self.micro_batch_size
        for step in range(self.first_step, self.steps):
            samples = self.samples(step)
            for start in range(self.rank * size, self.global_batch_size, self.ranks * size):
                yield samples[start : start + size]


class ValidationBatches:
    """Rows in their own order, dealt out to the ranks by micro-batches: a batch sampler.

    Every rank gets the same number of batches, because the ranks of a sharded model work together on each. Where the
    rows have come to an end, a batch repeats the first row and does not count.
    """

    def __init__(self, count: int, micro_batch_size: int, rank: int, ranks: int) -> None:
        self.count, self.size, self.rank, self.ranks = count, micro_batch_size, rank, ranks

    def __len__(self) -> int:
        """Batches of every rank."""
        return -(-self.count // (self.size * self.ranks))

    def _start(self, index: int) -> int:
        return (index * self.ranks + self.rank) * self.size

    def counts(self, index: int) -> bool:
        """Whether a batch of this rank holds rows that no other batch holds."""
        return self._start(index) < self.count

    def __iter__(self) -> Iterator[list[int]]:
        for index in range(len(self)):
            start = self._start(index)
            yield list(range(start, min(start + self.size, self.count))) or [0]
