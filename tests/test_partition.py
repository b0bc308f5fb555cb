# SPDX-License-Identifier: Apache-2.0
"""A model as (graphdef, trainable, frozen): there and back, static and hashable, and under JAX's transformations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import subjects
from flax import nnx

import jpeft

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
MODELS = {
    "list": lambda: subjects.ListOfLayers(4, 2, nnx.Rngs(0)),
    "stack": lambda: subjects.Stacked(4, 2, nnx.Rngs(0)),
    "no pytree": lambda: subjects.NoPytree(4, 2, nnx.Rngs(0)),
    "dict with integer keys": lambda: subjects.NumberedDict(4, 11, nnx.Rngs(0)),
    "nnx.scan": lambda: subjects.NnxScan(4, 2, nnx.Rngs(0)),
    "nnx.remat": lambda: subjects.NnxRemat(4, 2, nnx.Rngs(0)),
}


def lora(**options):
    return jpeft.LoRA(**{"rank": 2, "alpha": 3.0, "targets": ["up"], **options})


@pytest.fixture(params=MODELS, name="model")
def _model(request):
    return subjects.fill(jpeft.adapt(MODELS[request.param](), lora(bias="all"), key=KEY))


def test_there_and_back(model):
    graphdef, trainable, frozen = jpeft.partition(model)
    assert not trainable.keys() & frozen.keys()
    assert all(type(path) is str and isinstance(value, jax.Array) for path, value in {**trainable, **frozen}.items())
    assert set(trainable) == {path for path in {**trainable, **frozen} if "/adapters/" in path}
    again = jpeft.combine(graphdef, trainable, frozen)
    assert nnx.graphdef(again) == nnx.graphdef(model)
    again_graphdef, again_trainable, again_frozen = jpeft.partition(again)
    assert again_graphdef == graphdef
    chex.assert_trees_all_equal((again_trainable, again_frozen), (trainable, frozen))
    np.testing.assert_array_equal(again(X), model(X))


def test_combining_copies_nothing_and_changes_nothing(model):
    graphdef, trainable, frozen = jpeft.partition(model)
    other = jpeft.combine(graphdef, {path: 2 * value for path, value in trainable.items()}, frozen)
    for path, value in jpeft.partition(other)[2].items():
        assert value is frozen[path]
    chex.assert_trees_all_equal(jpeft.partition(model)[1], trainable)


def test_a_model_without_adapters_has_nothing_to_train():
    base = MODELS["list"]()
    graphdef, trainable, frozen = jpeft.partition(base)
    assert trainable == {}
    owners = [f"blocks/{i}/{name}" for i in (0, 1) for name in ("up", "down")]
    assert set(frozen) == {f"{owner}/{leaf}" for owner in owners for leaf in ("kernel", "bias")}
    np.testing.assert_array_equal(jpeft.combine(graphdef, {}, frozen)(X), base(X))


def test_prng_streams_and_statistics_are_frozen():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.norm(self.up(x)))

    model = subjects.fill(jpeft.adapt(Model(nnx.Rngs(0)), lora(), key=KEY))
    graphdef, trainable, frozen = jpeft.partition(model)
    assert {"drop/rngs/key", "drop/rngs/count", "norm/mean", "norm/var"} <= frozen.keys()
    run = jax.jit(lambda t, f, x: jpeft.combine(graphdef, t, f)(x))
    first = run(trainable, frozen, X)
    np.testing.assert_array_equal(run(trainable, frozen, X), first)  # neither stream nor statistics moved
    chex.assert_tree_all_finite(jax.grad(lambda t: run(t, frozen, X).sum())(trainable))


def test_the_graphdef_is_static(model):
    graphdef, trainable, frozen = jpeft.partition(model)
    assert hash(graphdef) == hash(jpeft.partition(nnx.clone(model))[0])
    assert repr(graphdef) == f"GraphDef({len(trainable)} trainable of {len(trainable) + len(frozen)} leaves)"
    run = jax.jit(lambda graphdef, t, f, x: jpeft.combine(graphdef, t, f)(x), static_argnums=0)
    np.testing.assert_allclose(run(graphdef, trainable, frozen, X), model(X), atol=1e-5)


def test_models_of_one_make_have_one_graphdef():
    def graphdef(seed=0, **options):
        model = jpeft.adapt(subjects.ListOfLayers(4, 2, nnx.Rngs(seed)), lora(**options), key=jax.random.key(seed))
        return jpeft.partition(model)[0]

    assert graphdef() == graphdef(1)
    assert hash(graphdef()) == hash(graphdef(1))
    patterns = {"rank_pattern": {"blocks.0.up": 3, "up": 1}}
    assert graphdef(**patterns) == graphdef(1, **patterns)
    assert len({graphdef(), graphdef(rank=3), graphdef(alpha=4), graphdef(dropout=0.1), graphdef(bias="all")}) == 5


def test_leaves_of_another_model_are_errors():
    graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(MODELS["list"](), lora(), key=KEY))
    path = "blocks/0/up/adapters/lora/A"
    less = {p: v for p, v in trainable.items() if p != path}
    with pytest.raises(ValueError, match=rf"the trainable leaves .*: 1 missing \({path}\); take both from one"):
        jpeft.combine(graphdef, less, frozen)
    with pytest.raises(ValueError, match=r"the trainable leaves .*: 1 unknown \(other\)"):
        jpeft.combine(graphdef, {**trainable, "other": trainable[path]}, frozen)
    with pytest.raises(ValueError, match=rf"1 missing \({path}\) and 1 unknown \(other\)"):
        jpeft.combine(graphdef, {**less, "other": trainable[path]}, frozen)
    with pytest.raises(ValueError, match=r"the frozen leaves .*: 8 missing \(.*, .*, .*, \.\.\.\)"):
        jpeft.combine(graphdef, trainable, {})
    with pytest.raises(ValueError, match=r"the trainable leaves .*: 4 missing .* and 8 unknown"):
        jpeft.combine(graphdef, frozen, trainable)


def test_two_leaves_of_one_path_are_an_error():
    model = nnx.Dict({"a/b": nnx.Param(jnp.ones(1)), "a": nnx.Dict(b=nnx.Param(jnp.ones(1)))})
    with pytest.raises(ValueError, match="two leaves of the model have the same path"):
        jpeft.partition(model)


def test_jit_compiles_once():
    model = jpeft.adapt(MODELS["stack"](), lora(), key=KEY)
    graphdef, trainable, frozen = jpeft.partition(model)
    tx = jpeft.optimizer(optax.sgd(0.1))
    state = tx.init(trainable)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(trainable, state, frozen, x):
        gradients = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(x) ** 2).mean())(trainable)
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state

    for _ in range(3):
        trainable, state = step(trainable, state, frozen, X)
    other = jpeft.partition(jpeft.adapt(MODELS["stack"](), lora(), key=jax.random.key(1)))
    assert other[0] == graphdef
    step(other[1], tx.init(other[1]), other[2], X)


def test_adapters_in_a_batch_are_one_at_a_time(model):
    """N adapters at once: vmap over trainable, with one base."""
    graphdef, trainable, frozen = jpeft.partition(model)
    scales = jnp.arange(3.0)
    many = {path: scales.reshape(-1, *(1,) * value.ndim) * value[None] for path, value in trainable.items()}

    def loss(trainable, frozen, x):
        return (jpeft.combine(graphdef, trainable, frozen)(x) ** 2).mean()

    both = jax.value_and_grad(loss)
    together = jax.jit(jax.vmap(both, in_axes=(0, None, None)))(many, frozen, X)
    for i, scale in enumerate(scales):
        alone = jax.jit(both)({path: scale * value for path, value in trainable.items()}, frozen, X)
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone, rtol=2e-5, atol=1e-6)


def test_an_adapter_per_example(model):
    graphdef, trainable, frozen = jpeft.partition(model)
    bank = {path: jnp.stack([0 * value, value, -value]) for path, value in trainable.items()}
    ids = jnp.array([2, 0, 1, 1, 0])
    one = lambda i, x: jpeft.combine(graphdef, {p: v[i] for p, v in bank.items()}, frozen)(x)  # noqa: E731
    mixed = jax.jit(jax.vmap(one))(ids, X)
    for row, i in enumerate(ids):
        alone = jpeft.combine(graphdef, {path: value[i] for path, value in bank.items()}, frozen)(X[row])
        np.testing.assert_allclose(mixed[row], alone, rtol=2e-5, atol=1e-6)


def test_without_values(model):
    graphdef, trainable, frozen = jpeft.partition(model)
    shapes = jax.eval_shape(lambda t, f: jpeft.combine(graphdef, t, f)(X), trainable, frozen)
    assert (shapes.shape, shapes.dtype) == (model(X).shape, model(X).dtype)


def test_gradients_of_everything_follow_the_split():
    """The frozen half may be differentiated as well; the halves' gradients are those of the whole."""
    graphdef, trainable, frozen = jpeft.partition(subjects.fill(jpeft.adapt(MODELS["list"](), lora(), key=KEY)))
    loss = lambda t, f: (jpeft.combine(graphdef, t, f)(X) ** 2).mean()  # noqa: E731
    both = jax.grad(loss, argnums=(0, 1))(trainable, frozen)
    chex.assert_trees_all_close(both[0], jax.grad(loss)(trainable, frozen), rtol=1e-5, atol=1e-7)
    assert both[1]["blocks/0/down/kernel"].any()
