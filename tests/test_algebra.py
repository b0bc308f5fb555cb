# SPDX-License-Identifier: Apache-2.0
"""Combinations of adapters against float64 formulas of what they change."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
import subjects
from algebra_oracle import (
    KEY,
    LAYERS,
    PROJECTIONS,
    SPECS,
    WEIGHTS,
    adapted,
    base,
    best,
    changed,
    check,
    delta,
    joined,
    pairs,
)
from contracts.models import BERT
from flax import nnx

import jpeft


@functools.cache
def weighted_sum(weights=WEIGHTS):
    return joined([delta(i) for i in range(3)], lambda arrays: sum(w * a for w, a in zip(weights, arrays, strict=True)))


@pytest.mark.parametrize("how", ["linear", "cat"])
def test_the_sum_is_exact_with_scales_patterns_starts_and_biases(how):
    model = jpeft.combine_adapters(pairs(), how)
    check(model, weighted_sum())
    sizes = {
        at: min(SPECS[0][1](*at)[0] + SPECS[1][1](*at)[0] + 2 * SPECS[2][1](*at)[0], 8) for at in ((0, "up"), (1, "up"))
    }
    method = model.blocks.up.adapters["lora"].method
    assert method.ranks(model.blocks.up.adapters["lora"].site) == (sizes[0, "up"], sizes[1, "up"], sizes[0, "up"])
    assert (method.rslora, method.bias) == (False, "lora_only")


def test_unstacked_layers_are_stacked_ones():
    ours, theirs = (
        jpeft.combine_adapters([(adapted(1, stacked), 0.5), (adapted(1, stacked), 2.0)]) for stacked in (True, False)
    )
    leaves, flat = subjects.leaves(ours), subjects.leaves(theirs)
    own = adapted(1, False)
    site = own.blocks[0].up.adapters["lora"]
    expected = 2.5 * 5 / math.sqrt(6) * np.asarray(site.A[...], np.float64) @ np.asarray(site.B[...], np.float64)
    at = "blocks/0/up/adapters/lora"
    assert subjects.error(flat[f"{at}/A"].astype(float) @ flat[f"{at}/B"], expected) < subjects.MERGED
    assert leaves["blocks/up/adapters/lora/A"].shape == (LAYERS, 8, 6)


def test_a_negated_adapter_takes_itself_away():
    check(jpeft.combine_adapters(pairs((0.0, -1.0, 0.0))), weighted_sum((0.0, -1.0, 0.0)))
    model = jpeft.combine_adapters([(adapted(0), 1.0), (adapted(0), -1.0)], "svd", rank=4)
    assert max(np.abs(value).max() for value in changed(model).values()) < 1e-14


def test_leaves_may_stand_for_a_model_of_the_same_make():
    _, trainable, _ = jpeft.partition(adapted(0))
    other = {path: 2 * leaf for path, leaf in trainable.items()}
    model = jpeft.combine_adapters([(other, 0.5), (adapted(0), -1.0)])
    check(model, {at: (0.5 * 4 - 1) * value for at, value in delta(0).items()})


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_svd_is_the_nearest_of_its_rank(rank):
    expected = {at: best(v, rank) if v.ndim == 2 else v for at, v in weighted_sum().items()}
    check(jpeft.combine_adapters(pairs(), "svd", rank=rank), expected, subjects.FLOAT32)


def test_energy_is_reached_by_the_fewest_columns():
    model = jpeft.combine_adapters(pairs(), "svd", energy=0.9)
    expected, ranks = {}, {}
    for at, value in weighted_sum().items():
        if value.ndim == 2:
            share = np.cumsum(np.linalg.svd(value)[1] ** 2) / (value**2).sum()
            ranks[at] = 1 + int((share < 0.9).sum())
        expected[at] = best(value, ranks[at]) if value.ndim == 2 else value
    check(model, expected, subjects.FLOAT32)
    up = model.blocks.up.adapters["lora"]
    assert up.method.ranks(up.site) == tuple(ranks[layer, "up", "kernel"] for layer in range(LAYERS))


def trimmed(found, density, over):
    """The formula of TIES' first step, entry by entry."""
    groups = [list(found)] if over == "model" else [[at] for at in found]
    if over == "matrix":  # a bias is one leaf of all layers
        groups = [[at] for at in found if at[2] == "kernel"]
        groups += [
            [(layer, name, "bias") for layer in range(LAYERS)] for name in PROJECTIONS if (0, name, "bias") in found
        ]
    out = {}
    for group in groups:
        sizes = np.sort(np.concatenate([np.abs(found[at]).ravel() for at in group]))[::-1]
        kept = int(density * len(sizes))
        for at in group:
            out[at] = found[at] * (np.abs(found[at]) >= sizes[kept - 1])
    return out


def elected(arrays):
    """Steps two and three: per entry the sign of the sum, and the mean of those that agree."""
    out = np.zeros_like(arrays[0])
    for index in np.ndindex(out.shape):
        values = np.array([array[index] for array in arrays])
        agree = values[(np.sign(values) == np.sign(values.sum())) & (values != 0)]
        out[index] = agree.mean() if len(agree) else 0.0
    return out


@pytest.mark.parametrize("over", ["model", "matrix"])
@pytest.mark.parametrize("how", ["ties", "magnitude_prune"])
def test_trimming_and_signs_are_the_papers(how, over):
    zeros = {at: 0.0 * value for at, value in delta(1).items()}
    values = [trimmed({**zeros, **delta(i)}, 0.3, over) for i in range(3)]
    weighted = [{at: w * v for at, v in found.items()} for w, found in zip(WEIGHTS, values, strict=True)]
    expected = joined(weighted, elected if how == "ties" else sum)
    check(jpeft.combine_adapters(pairs(), how, density=0.3, over=over, rank=8), expected, subjects.FLOAT32)


def test_dare_drops_at_random_and_keeps_the_mean():
    model = jpeft.combine_adapters([(adapted(1), 2.0)], "dare_linear", density=0.25, rank=8, key=KEY)
    kept = []
    for at, value in changed(model).items():
        factor = value / (2.0 * delta(1)[at])
        assert (np.isclose(factor, 0, atol=2e-5) | np.isclose(factor, 4, atol=2e-4)).all()
        kept.append((factor > 2).ravel())
    share = np.concatenate(kept).mean()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 840)
    again, other = (
        changed(
            jpeft.combine_adapters([(adapted(1), 2.0)], "dare_linear", density=0.25, rank=8, key=jax.random.key(seed))
        )
        for seed in (0, 1)
    )
    assert all((again[at] == value).all() for at, value in changed(model).items())
    assert not all((other[at] == value).all() for at, value in changed(model).items())


def test_dare_with_everything_kept_is_the_sum_and_ties_of_it():
    options: dict[str, Any] = {"density": 1.0, "rank": 8, "key": KEY}
    check(jpeft.combine_adapters(pairs(), "dare_linear", **options), weighted_sum(), subjects.FLOAT32)
    weighted = [{at: w * v for at, v in delta(i).items()} for i, w in enumerate(WEIGHTS)]
    check(jpeft.combine_adapters(pairs(), "dare_ties", **options), joined(weighted, elected), subjects.FLOAT32)


def test_heads_are_summed_with_the_rest():
    head = jpeft.models.build(BERT | {"num_labels": 3}, "SEQ_CLS", key=jax.random.key(1))
    models = [
        subjects.fill(jpeft.adapt(head, jpeft.LoRA(rank=r, targets=["query"]), key=jax.random.key(r)), r)
        for r in (1, 2)
    ]
    flat = subjects.as64(subjects.leaves(head))
    got = subjects.leaves(jpeft.combine_adapters([(models[0], 0.5), (models[1], -2.0)], name="sum"))
    for leaf in ("kernel", "bias"):
        own = [subjects.leaves(model)[f"classifier/adapters/lora/saved/{leaf}"] for model in models]
        start = flat[f"classifier/{leaf}"]
        expected = start + 0.5 * (own[0] - start) - 2 * (own[1] - start)
        assert subjects.error(got[f"classifier/adapters/sum/saved/{leaf}"], expected) < subjects.MERGED


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "how": ({"how": "sum"}, "how must be one of linear, cat, svd, ties, .*; got 'sum'"),
    "a rank of an exact sum": ({"how": "linear", "rank": 4}, "how='linear' is exact, .* use how='svd'"),
    "no rank": ({"how": "svd"}, "any rank; say by rank= or energy="),
    "rank": ({"how": "svd", "rank": 0}, "rank must be a whole number of at least 1, got 0"),
    "energy": ({"how": "svd", "energy": 1.5}, r"in \(0, 1\]; got 1.5"),
    "no density": ({"how": "ties", "rank": 4}, r"needs a density in \(0, 1\], got None"),
    "density": ({"how": "ties", "rank": 4, "density": 0.0}, r"needs a density in \(0, 1\], got 0.0"),
    "useless density": ({"how": "svd", "rank": 4, "density": 0.5}, "takes no density"),
    "no key": ({"how": "dare_ties", "rank": 4, "density": 0.5}, "needs a key"),
    "useless key": ({"how": "ties", "rank": 4, "density": 0.5, "key": KEY}, "takes no key"),
    "over": ({"over": "layer"}, "over must be model or matrix, got 'layer'"),
}


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG)
def test_an_option_that_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.combine_adapters(pairs(), **options)


def test_adapters_that_cannot_be_combined():
    with pytest.raises(ValueError, match="pairs, at least one"):
        jpeft.combine_adapters([])
    with pytest.raises(ValueError, match="pairs, at least one"):
        jpeft.combine_adapters([adapted(0)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="finite number, got nan"):
        jpeft.combine_adapters([(adapted(0), math.nan)])
    with pytest.raises(ValueError, match="none of the adapters is a model"):
        jpeft.combine_adapters([(jpeft.partition(adapted(0))[1], 1.0)])
    other = jpeft.adapt(subjects.Stacked(8, LAYERS, nnx.Rngs(1)), jpeft.LoRA(targets=["up"]), key=KEY)
    with pytest.raises(ValueError, match="adapters 0 and 1 stand on different bases: blocks/down/bias differs"):
        jpeft.combine_adapters([(adapted(0), 1.0), (other, 1.0)])
    with pytest.raises(ValueError, match="no adapter on a projection"):
        jpeft.as_lora(base())
