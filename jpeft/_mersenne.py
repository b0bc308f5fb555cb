# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are torch's: what its CPU generator (MT19937) draws from a seed, without torch.

PEFT leaves constants out of its files and draws them again from a seed; here they are the same, to the bit.
"""

from collections.abc import Sequence

import numpy as np

#: From this length on, torch draws a permutation in another way.
LONGEST = (2**32 - 1) // 20


def permutation(seed: int, size: int, count: int) -> np.ndarray:
    """The first `count` entries of `torch.randperm(size, generator=torch.Generator().manual_seed(seed))`.

    Raises:
      ValueError: `size` is `LONGEST` or more.
    """
    if size >= LONGEST:
        raise ValueError(f"torch's permutations of {LONGEST:,} numbers and more are drawn otherwise; got {size:,}")
    moved: dict[int, int] = {}  # by place, what the exchanges before have put there
    drawn = []
    for i, number in enumerate(_numbers(seed, count).tolist()):
        other = i + number % (size - i)
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(i, i)
    return np.array(drawn, np.int64)


def uniforms(seed: int, *draws: tuple[float, Sequence[int]]) -> list[np.ndarray]:
    """What `torch.empty(shape).uniform_(-bound, bound, generator=...)` gives for each (bound, shape) in turn."""
    sizes = [int(np.prod(shape)) for _, shape in draws]
    parts = np.split(_numbers(seed, sum(sizes)), np.cumsum(sizes)[:-1])
    return [_uniform(part, bound).reshape(shape) for part, (bound, shape) in zip(parts, draws, strict=True)]


def _uniform(numbers: np.ndarray, bound: float) -> np.ndarray:
    low, high = np.float32(-bound), np.float32(bound)
    fraction = (numbers & (2**24 - 1)) / 2.0**24
    return (fraction * float(high - low) + float(low)).astype(np.float32)  # a product and a sum with one rounding


def _numbers(seed: int, count: int) -> np.ndarray:
    """The generator's first `count` numbers, of 32 bits each."""
    return np.frombuffer(np.random.RandomState(seed % 2**32).bytes(4 * count), "<u4")
