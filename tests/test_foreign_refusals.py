# SPDX-License-Identifier: Apache-2.0
"""Foreign models with what has no matrix, shared variables, names outside of ASCII, stacks in stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from flax import nnx

import jpeft
from jpeft._stack import scan as jpeft_scan
from jpeft._stack import stack as jpeft_stack

KEY = jax.random.key(0)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


class SharedVariable(nnx.Module):
    """Two Linears that read one bias, and a third of its own."""

    def __init__(self, d, rngs):
        self.first = nnx.Linear(d, d, rngs=rngs)
        self.second = nnx.Linear(d, d, rngs=rngs)
        self.second.bias = self.first.bias
        self.third = nnx.Linear(d, d, rngs=rngs, bias_init=nnx.initializers.normal())

    def __call__(self, x):
        return self.third(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


def equation_at_the_call(rngs):
    module = nnx.Einsum("bi,io->bo", (4, 5), rngs=rngs)
    module.einsum_str = None  # type: ignore[assignment]
    return module


REFUSED = {
    "many small matrices": (lambda r: nnx.Einsum("ebi,eio->ebo", (3, 4, 5), rngs=r), "the axes e of 'ebi,eio->ebo'"),
    "a kernel axis that is summed away": (lambda r: nnx.Einsum("bi,ioz->bo", (4, 5, 2), rngs=r), "no plain matrix"),
    "a diagonal": (lambda r: nnx.Einsum("bi,iioo->bo", (4, 4, 5, 5), rngs=r), "no plain matrix"),
    "an ellipsis in the kernel": (lambda r: nnx.Einsum("...i,i...->...", (4, 5), rngs=r), "many small matrices"),
    "an equation given at the call": (equation_at_the_call, "has the equation None"),
    "LinearGeneral of a first axis": (lambda r: nnx.LinearGeneral(4, 5, axis=0, rngs=r), "axis=.0,."),
    "LinearGeneral with a batch axis": (
        lambda r: nnx.LinearGeneral(4, 5, batch_axis={0: 3}, rngs=r),
        "has no matrix form",
    ),
    "grouped convolution": (lambda r: nnx.Conv(4, 6, 3, feature_group_count=2, rngs=r), "feature_group_count=2"),
    "masked convolution": (lambda r: nnx.Conv(2, 3, 3, mask=jnp.ones((3, 2, 3)), rngs=r), "with a mask"),
}


class Pair(nnx.Module):
    """A module that adapters cannot handle beside one that they can."""

    def __init__(self, odd, rngs):
        self.odd = odd(rngs)
        self.up = nnx.Linear(4, 4, rngs=rngs)


@pytest.mark.parametrize("build, message", REFUSED.values(), ids=REFUSED)
def test_what_has_no_matrix_is_refused_by_path(build, message):
    model = Pair(build, nnx.Rngs(0))
    with pytest.raises(ValueError, match=rf"odd: .*{message}"):
        jpeft.adapt(model, jpeft.LoRA(targets=["odd"]), key=KEY)
    (refused,) = (site for site in jpeft.sites(model) if site.path == "odd")
    assert message.partition(".")[0] in refused.refused


@pytest.mark.parametrize("build, message", REFUSED.values(), ids=REFUSED)
def test_what_has_no_matrix_does_not_hinder_its_neighbours(build, message):
    model = jpeft.adapt(Pair(build, nnx.Rngs(0)), jpeft.LoRA(targets=["up"], bias="all"), key=KEY)
    assert {path.split("/")[0] for path in jpeft.partition(model)[1]} >= {"up"}


def test_a_shared_variable_is_refused_where_it_would_change_and_only_there():
    model = SharedVariable(4, nnx.Rngs(0))
    with pytest.raises(ValueError, match="first and second share one parameter, bias"):
        jpeft.adapt(model, jpeft.LoRA(targets=["first"]), key=KEY)
    with pytest.raises(ValueError, match="first and second share one parameter, bias"):
        jpeft.adapt(model, jpeft.LoRA(targets=["third"], modules_to_save=["second"]), key=KEY)
    adapted = subjects.fill(jpeft.adapt(model, jpeft.LoRA(targets=["third"]), key=KEY))
    merged = jpeft.merge(adapted)
    assert merged.first.bias is merged.second.bias
    x = normal(2, 4)
    assert subjects.error(merged(x), adapted(x)) < subjects.MERGED


class Unicode(nnx.Module):
    """Attributes outside of ASCII."""

    def __init__(self, rngs):
        self.größe = nnx.Linear(4, 4, rngs=rngs)
        self.注意 = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.注意(self.größe(x))


def test_names_outside_of_ascii():
    model = subjects.fill(jpeft.adapt(Unicode(nnx.Rngs(0)), jpeft.LoRA(targets=["größe", "注意"]), key=KEY))
    assert {path.split("/")[0] for path in jpeft.partition(model)[1]} == {"größe", "注意"}
    x = normal(2, 4)
    with jax.enable_x64(True):
        model, x = subjects.in_float64(model), x.astype(np.float64)
        assert subjects.error(jpeft.merge(model)(x), model(x)) < subjects.FLOAT64


class Nested(nnx.Module):
    """A stack of modules that each hold a stack."""

    def __init__(self, rngs):
        self.outer = jpeft_stack(lambda r: Inner(r), 3, rngs)

    def __call__(self, x):
        return jpeft_scan(self.outer, lambda inner, x, _: (inner(x), None), x)[0]


class Inner(nnx.Module):
    """The inner stack."""

    def __init__(self, rngs):
        self.blocks = jpeft_stack(lambda r: subjects.Block(4, r), 2, rngs)

    def __call__(self, x):
        return jpeft_scan(self.blocks, lambda block, x, _: (block(x), None), x)[0]


def test_a_stack_in_a_stack():
    """Six layers of ranks of their own, against the loop over six blocks in NumPy."""
    base = Nested(nnx.Rngs(0))
    up = next(site for site in jpeft.sites(base) if site.path == "outer/blocks/up")
    assert up.lead == (3, 2)
    assert up.names[:3] == ("outer.0.blocks.0.up", "outer.0.blocks.1.up", "outer.1.blocks.0.up")
    ranks = {r"outer.0.blocks.1.up": 1, r"outer.2.blocks.\d.up": 3}
    method = jpeft.LoRA(rank=2, alpha=3.0, targets=["up"], rank_pattern=ranks, dropout=0.5)
    model = subjects.fill(jpeft.adapt(base, method, key=KEY))
    x = normal(2, 4)
    flat = subjects.leaves(model)
    expected = np.asarray(x, np.float64)
    for i, j in np.ndindex(3, 2):
        at = {path.removeprefix("outer/blocks/"): value[i, j] for path, value in flat.items()}
        rank = {(0, 1): 1, (2, 0): 3, (2, 1): 3}.get((i, j), 2)
        a, b = at["up/adapters/lora/A"][:, :rank], at["up/adapters/lora/B"][:rank]
        h = np.tanh(expected @ at["up/kernel"] + at["up/bias"] + 3.0 / rank * ((expected @ a) @ b))
        expected = expected + h @ at["down/kernel"] + at["down/bias"]
    assert subjects.error(jax.jit(lambda m, x: m(x))(model, x), expected) < subjects.FLOAT32
    with jax.enable_x64(True):
        model, x = subjects.in_float64(model), x.astype(np.float64)
        assert subjects.error(jpeft.merge(model)(x), model(x)) < subjects.FLOAT64


def test_register_takes_a_module_type_and_a_projection():
    with pytest.raises(TypeError, match=r"a subclass of nnx\.Module, got <class 'int'>"):
        jpeft.register(int, jpeft.seams.Lookup())
    with pytest.raises(TypeError, match=r"a jpeft\.seams\.Projection .* got 'w'"):
        jpeft.register(OwnAdapters, "w")  # type: ignore[arg-type]


def test_an_attribute_called_adapters_is_not_hidden():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    model.adapters = nnx.Dict()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="an attribute 'adapters' of its own"):
        jpeft.adapt(model, jpeft.LoRA(targets=".*"), key=KEY)


class OwnAdapters(nnx.Module):
    """A model that has modules called adapters itself."""

    def __init__(self, rngs):
        self.adapters = nnx.List([nnx.Linear(4, 4, rngs=rngs)])

    def __call__(self, x):
        return self.adapters[0](x)


def test_a_models_own_adapters_are_modules_like_others():
    model = jpeft.adapt(OwnAdapters(nnx.Rngs(0)), jpeft.LoRA(targets="all-linear"), key=KEY)
    _, trainable, frozen = jpeft.partition(model)
    assert set(trainable) == {"adapters/0/adapters/lora/A", "adapters/0/adapters/lora/B"}
    assert set(frozen) == {"adapters/0/kernel", "adapters/0/bias"}
