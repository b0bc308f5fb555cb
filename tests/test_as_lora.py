# SPDX-License-Identifier: Apache-2.0
"""Any mergeable method as a LoRA against a float64 formula of what it changes; averages of leaves."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from algebra_oracle import (
    KEY,
    LAYERS,
    PROJECTIONS,
    X,
    adapted,
    base,
    best,
    check,
    delta,
    joined,
)
from contracts.table import QUICK
from flax import nnx

import jpeft
from jpeft import seams
from jpeft._method import Method, Start, Targets


@dataclasses.dataclass(frozen=True)
class OutputScale(Method):
    """A method that is no LoRA, of full rank, which changes biases when merged."""

    kind: ClassVar[str] = "output_scale"
    targets: tuple[str, ...] = PROJECTIONS

    def select(self, model_type):
        return Targets(self.targets)

    def start(self, site, base, key):
        return Start({"scale": jnp.ones((*site.lead, site.d_out))})

    def after(self, adapter, base, y, *inputs):
        return y * adapter.scale[...][None]

    def merge(self, adapter, base):
        projection, scale = seams.projection(base), adapter.scale[...]
        matrix = projection.read(base) * scale[..., None, :]
        return {projection.kernel: projection.unmatrix(base, matrix), "bias": base.bias[...] * scale}

    def count(self, site):
        return 0, 0


@functools.cache
def scaled():
    return subjects.fill(jpeft.adapt(base(), OutputScale(), key=KEY), 3)


def scale_delta():
    flat, found = subjects.as64(subjects.leaves(scaled())), {}
    for layer in range(LAYERS):
        for name in PROJECTIONS:
            factor = flat[f"blocks/{name}/adapters/output_scale/scale"][layer] - 1.0
            found[layer, name, "kernel"] = flat[f"blocks/{name}/kernel"][layer] * factor
            found[layer, name, "bias"] = flat[f"blocks/{name}/bias"][layer] * factor
    return found


def test_any_method_with_a_merged_form_becomes_a_lora():
    lora, errors = jpeft.as_lora(scaled())
    check(lora, scale_delta(), subjects.FLOAT32)
    assert max(errors.values()) == 0.0
    cut, errors = jpeft.as_lora(scaled(), rank=3)
    expected = {at: best(v, 3) if v.ndim == 2 else v for at, v in scale_delta().items()}
    check(cut, expected, subjects.FLOAT32)
    for (layer, name, leaf), value in scale_delta().items():
        if leaf == "kernel":
            own = subjects.error(best(value, 3), value)
            assert abs(errors[f"blocks.{layer}.{name}"] - own) < 1e-10
    kept, errors = jpeft.as_lora(scaled(), energy=0.8)
    assert 0 < max(errors.values()) <= math.sqrt(0.2)
    assert jpeft.summary(kept).trainable < jpeft.summary(lora).trainable
    both = jpeft.combine_adapters([(scaled(), 0.5), (adapted(0), 2.0)])
    expected = joined(
        [{at: 0.5 * v for at, v in scale_delta().items()}, {at: 2 * v for at, v in delta(0).items()}], sum
    )
    check(both, expected, subjects.FLOAT32)


@pytest.mark.parametrize("i", range(3))
def test_a_lora_becomes_a_plain_one(i):
    lora, errors = jpeft.as_lora(adapted(i))
    check(lora, delta(i))
    assert not any(errors.values())
    method = lora.blocks.up.adapters["lora"].method
    assert method.alpha == method.rank
    assert (method.alpha_pattern, method.init) == (method.rank_pattern, "default")


def test_one_adapter_of_several_or_all_together():
    two = subjects.fill(jpeft.adapt(adapted(0), jpeft.LoRA(rank=2, alpha=6, targets=["up"]), key=KEY, name="second"), 9)
    flat = subjects.as64(subjects.leaves(two))
    one, _ = jpeft.as_lora(two, "second")
    got = subjects.as64(subjects.leaves(one))
    assert not any("down" in path for path in got if "adapters" in path)
    at = "blocks/up/adapters/second"
    expected = 3 * flat[f"{at}/A"] @ flat[f"{at}/B"]
    assert subjects.error(got[f"{at}/A"] @ got[f"{at}/B"], expected) < subjects.MERGED
    whole, _ = jpeft.as_lora(two)
    got = jax.jit(lambda x: whole(x), compiler_options=QUICK)(X)
    assert subjects.error(got, jax.jit(lambda x: two(x), compiler_options=QUICK)(X)) < 2 * subjects.FLOAT32
    with pytest.raises(ValueError, match="no adapter 'third'; it has lora, second"):
        jpeft.as_lora(two, "third")


def test_some_layers_an_embedding_and_a_convolution():
    some = subjects.fill(jpeft.adapt(base(), jpeft.LoRA(rank=2, targets=["up"], layers=[0, 2]), key=KEY), 1)
    lora, errors = jpeft.as_lora(some)
    assert lora.blocks.up.adapters["lora"].site.active == (True, False, True)
    assert sorted(errors) == ["blocks.0.up", "blocks.2.up"]
    net = nnx.Sequential(nnx.Embed(7, 6, rngs=nnx.Rngs(0)), nnx.Conv(6, 3, (2,), rngs=nnx.Rngs(1)))
    model = subjects.fill(jpeft.adapt(net, jpeft.LoRA(rank=2, alpha=5, targets=["layers.0", "layers.1"]), key=KEY), 1)
    ids = np.arange(6)[None]
    assert subjects.error(jpeft.as_lora(model)[0](ids), model(ids)) < subjects.FLOAT32


def test_an_average_is_of_the_leaves():
    models = [subjects.fill(adapted(1), seed) for seed in (1, 2, 3)]
    for weights in (None, [-0.2, 0.9, 0.3]):
        got = subjects.leaves(jpeft.average(models, weights))
        own = [subjects.as64(subjects.leaves(model)) for model in models]
        for path in jpeft.partition(models[0])[1]:
            expected = sum(w * flat[path] for w, flat in zip(weights or [1 / 3] * 3, own, strict=True))
            assert subjects.error(got[path], expected) < subjects.MERGED, path
    with pytest.raises(ValueError, match="models 0 and 1 differ in method, options or places"):
        jpeft.average([adapted(0), adapted(1)])
    with pytest.raises(ValueError, match="got 1 weights for 3 models"):
        jpeft.average(models, [1.0])
    with pytest.raises(ValueError, match="at least one model"):
        jpeft.average([])
    other = jpeft.adapt(subjects.Stacked(8, LAYERS, nnx.Rngs(1)), adapted(1).blocks.up.adapters["lora"].method, key=KEY)
    with pytest.raises(ValueError, match="differ in blocks/down/bias, which is not trained"):
        jpeft.average([adapted(1), other])
