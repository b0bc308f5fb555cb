# SPDX-License-Identifier: Apache-2.0
"""Torch's random numbers, against torch itself, to the bit."""

import numpy as np
import pytest
import torch

from jpeft import _mersenne

SEEDS = [0, 777, 2**31 + 5, 2**32 + 3]


def generator(seed):
    return torch.Generator(device="cpu").manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size, count", [(7, 7), (1, 1), (15, 14), (768 * 20, 1000)])
def test_permutations(seed, size, count):
    expected = torch.randperm(size, generator=generator(seed))[:count].numpy()
    np.testing.assert_array_equal(_mersenne.permutation(seed, size, count), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_uniforms_one_after_the_other(seed):
    draws = (0.3, (3, 7)), (1.1, (9, 50)), ((6 / 768) ** 0.5, (5, 768))
    own = generator(seed)
    for found, (bound, shape) in zip(_mersenne.uniforms(seed, *draws), draws, strict=True):
        expected = torch.empty(shape).uniform_(-bound, bound, generator=own).numpy()
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_a_permutation_that_torch_draws_otherwise():
    with pytest.raises(ValueError, match="of 214,748,364 numbers and more are drawn otherwise; got 214,748,365"):
        _mersenne.permutation(0, 214_748_365, 3)
