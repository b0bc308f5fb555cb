# SPDX-License-Identifier: Apache-2.0
"""`disable` and `scale`: adapters turned off, up and down, without a new program."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from contracts.models import MODELS
from contracts.table import IDS, METHODS, Case
from flax import nnx

import jpeft
from jpeft import seams
from jpeft._method import Targets

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)

#: Every line of the contracts on the model of somebody's own; what adds tokens is refused below.
CASES = [Case(name, "foreign") for name, line in METHODS.items() if "foreign" in line.on]


def scalable(case):
    adapters = [a for _, m in nnx.iter_modules(case.filled) for a in getattr(m, "adapters", {}).values()]
    return not any(a.acts and a.site.seam in ("input", "keys_values") for a in adapters)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method)
def test_zero_is_the_base_and_one_the_adapter_bit_for_bit(case):
    if not scalable(case):
        with pytest.raises(ValueError, match=r"acts at a place .* there is no part of a token; scale the others by"):
            jpeft.scale(case.filled, 0.5)
        return
    base, adapted = case.run(case.base, IDS), case.run(case.filled, IDS)
    np.testing.assert_array_equal(case.run(jpeft.scale(case.filled, 0.0), IDS), base)
    np.testing.assert_array_equal(case.run(jpeft.scale(case.filled, 1.0), IDS), adapted)
    half = jpeft.scale(case.filled, 0.5)
    out = case.run(half, IDS)
    assert subjects.error(out, base) > 0.01
    assert subjects.error(out, adapted) > 0.01
    if case.line.merges:
        assert subjects.error(case.run(jpeft.merge(half), IDS), out) < subjects.FLOAT32
    assert jpeft.summary(half).trainable == jpeft.summary(case.filled).trainable
    assert nnx.graphdef(jpeft.strip(half)) == nnx.graphdef(case.base)


@pytest.mark.parametrize("method", [method for method, line in METHODS.items() if "tied llama" in line.on])
def test_a_tied_head_is_scaled_too(method):
    case = Case(method, "tied llama")
    np.testing.assert_array_equal(case.run(jpeft.scale(case.filled, 0), IDS), case.run(case.base, IDS))
    np.testing.assert_array_equal(case.run(jpeft.scale(case.filled, 1), IDS), case.run(case.filled, IDS))
    half = jpeft.scale(case.filled, 0.5)
    assert subjects.error(case.run(jpeft.merge(half), IDS), case.run(half, IDS)) < subjects.FLOAT32


def lora(name="lora", **options):
    return {"method": jpeft.LoRA(**{"rank": 2, "alpha": 3.0, "targets": ["up"], **options}), "key": KEY, "name": name}


def two(build=subjects.Stacked):
    """Two adapters, one of them with trained biases."""
    model = jpeft.adapt(build(4, 3, nnx.Rngs(0)), **lora("one", bias="all"))
    return subjects.fill(jpeft.adapt(model, **lora("two", targets=["up", "down"], layers=[0, 2])))


def test_a_factor_is_a_factor_of_loras_update_in_float64():
    """y + f s x A B, that is alpha times f; in every layer and through a merge."""
    with jax.enable_x64(True):
        base = subjects.Stacked(4, 3, nnx.Rngs(0))
        model = subjects.in_float64(subjects.fill(jpeft.adapt(base, **lora())))
        _, trainable, frozen = jpeft.partition(model)
        scaled = jpeft.scale(model, -0.7)
        kernel, leaves = np.asarray(frozen["blocks/up/kernel"]), {p.rpartition("/")[2]: v for p, v in trainable.items()}
        merged = subjects.leaves(jpeft.merge(scaled))
        expected = kernel - 0.7 * 1.5 * leaves["A"] @ leaves["B"]
        assert subjects.error(merged["blocks/up/kernel"], expected) < subjects.FLOAT64
        assert subjects.error(scaled(X.astype(float)), jpeft.merge(scaled)(X.astype(float))) < subjects.FLOAT64


@pytest.mark.parametrize("build", [subjects.Stacked, subjects.ListOfLayers, subjects.Vmapped])
def test_adapters_are_scaled_and_disabled_by_name(build):
    model = two(build)
    one, other = jpeft.disable(model, "two"), jpeft.disable(model, "one")
    assert {row.name for row in jpeft.summary(one).rows} == {"one"}
    np.testing.assert_array_equal(jpeft.scale(model, 0, "two")(X), one(X))
    np.testing.assert_array_equal(jpeft.scale(model, 0, "one")(X), other(X))
    np.testing.assert_array_equal(jpeft.scale(model, 0)(X), jpeft.strip(model)(X))
    np.testing.assert_array_equal(jpeft.scale(jpeft.scale(model, 0.3), 1.0)(X), model(X))
    assert nnx.graphdef(jpeft.disable(model)) == nnx.graphdef(jpeft.disable(model, "one", "two"))
    assert nnx.graphdef(jpeft.disable(model)) == nnx.graphdef(build(4, 3, nnx.Rngs(0)))
    mixed = jpeft.scale(jpeft.scale(model, 0.3, "one"), 2.0, "two")
    assert subjects.error(jpeft.merge(mixed)(X), mixed(X)) < subjects.FLOAT32
    assert subjects.error(mixed(X), model(X)) > 0.01


def test_the_given_model_stays_as_it_is():
    model = two()
    before = jpeft.partition(model)
    jpeft.scale(model, 0.5)
    jpeft.disable(model, "one")
    after = jpeft.partition(model)
    assert before[0] == after[0]
    assert all(after[2][path] is value for path, value in before[2].items())


def test_another_factor_runs_the_same_program():
    chex.clear_trace_counter()
    graphdef, trainable, _ = jpeft.partition(jpeft.scale(two(), 1.0))

    def loss(trainable, frozen):
        return (jpeft.combine(graphdef, trainable, frozen)(X) ** 2).sum()

    step = jax.jit(jax.value_and_grad(chex.assert_max_traces(loss, n=1)))
    losses = set()
    for factor in (0.0, 0.5, 1.0, -2, jnp.float32(3)):
        again, _, frozen = jpeft.partition(jpeft.scale(two(), factor))
        assert again == graphdef
        losses.add(float(step(trainable, frozen)[0]))
    assert len(losses) == 5


def test_a_factor_may_be_traced_and_has_a_gradient():
    model = two()
    slope = jax.grad(lambda f: jpeft.scale(model, f)(X).sum())(0.5)
    step = (jpeft.scale(model, 0.501)(X).sum() - jpeft.scale(model, 0.499)(X).sum()) / 0.002
    assert float(slope) == pytest.approx(float(step), rel=1e-2)


def test_in_bfloat16_the_ends_are_exact():
    model = subjects.cast(two(), jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    np.testing.assert_array_equal(jpeft.scale(model, 0)(x), jpeft.strip(model)(x))
    np.testing.assert_array_equal(jpeft.scale(model, 1)(x), model(x))


WRONG = [
    (lambda m: jpeft.scale(m, 0.5, "three"), "the model has no adapter 'three'; it has one, two"),
    (lambda m: jpeft.disable(m, "one", "three"), "the model has no adapter 'three'; it has one, two"),
    (lambda m: jpeft.scale(jpeft.strip(m), 0.5), "the model has no adapter; it has none"),
    (lambda m: jpeft.scale(m, True), "the factor must be a number, got True"),
    (lambda m: jpeft.scale(m, "0.5"), "the factor must be a number, got '0.5'"),
    (lambda m: jpeft.scale(m, None), "the factor must be a number, got None"),
    (lambda m: jpeft.scale(m, float("nan")), "the factor must be finite, got nan"),
    (lambda m: jpeft.scale(m, np.ones(3)), r"the factor must be one number, got an array of the shape \[3\]"),
]


@pytest.mark.parametrize("call, message", WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_what_has_no_meaning_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(two())


@dataclasses.dataclass(frozen=True)
class Longer(jpeft.Method):
    """Adds a row to what comes out of a module."""

    kind = "longer"
    targets: tuple[str, ...] = ("up",)

    def select(self, model_type):
        return Targets(self.targets)

    def after(self, adapter, base, y, *inputs):
        return jnp.concatenate([y, y[:1]])

    def count(self, site):
        return 0, 0


def test_a_method_that_changes_a_shape_is_refused_when_it_runs():
    block = jpeft.adapt(subjects.Block(4, nnx.Rngs(0)), Longer(), key=KEY)
    with pytest.raises(ValueError, match=r"'longer' at up changes more than the values of what passes, .* be scaled"):
        jpeft.scale(block, 0.5).up(X)


@pytest.mark.parametrize("seam, added", [("input", True), ("keys_values", True), ("residual", False)])
def test_what_adds_tokens_cannot_be_scaled(seam, added):
    @dataclasses.dataclass(frozen=True)
    class AtSeam(jpeft.Method):
        kind = "at_seam"

        def select(self, model_type):
            return Targets(".*", seam=seam)

        def count(self, site):
            return 0, 0

    model = jpeft.adapt(MODELS["foreign"].build(), AtSeam(), key=KEY)
    if not added:
        jpeft.scale(model, 0.5)(IDS)
        return
    message = rf"'at_seam' acts at a {re.escape(seams.KINDS[seam])}, .*what it adds are tokens"
    with pytest.raises(ValueError, match=message):
        jpeft.scale(model, 0.5)
    np.testing.assert_array_equal(jpeft.disable(model, "at_seam")(IDS), MODELS["foreign"].build()(IDS))


def test_a_scaled_adapter_is_not_exported_as_if_it_were_not():
    model = jpeft.adapt(MODELS["llama"].build(), jpeft.LoRA(rank=2), key=KEY)
    with pytest.raises(ValueError, match="PEFT has no format for the adapter 'lora', a scaled"):
        jpeft.export_peft(jpeft.scale(model, 0.5), "/nowhere")
