# SPDX-License-Identifier: Apache-2.0
"""`adapt`, `merge`, `strip`: a new model that shares the base's arrays, composes, and comes off without a trace."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from flax import nnx

import jpeft

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)


def lora(**options):
    return jpeft.LoRA(**{"rank": 2, "alpha": 3.0, "targets": ["up"], **options})


def stacked(num_layers=3):
    return subjects.Stacked(4, num_layers, nnx.Rngs(0))


def listed(num_layers=3):
    return subjects.ListOfLayers(4, num_layers, nnx.Rngs(0))


def trained(model):
    """Paths of the trainable leaves."""
    return set(jpeft.partition(model)[1])


def assert_merges(model, x=X):
    """Merged equals adapted, in float64."""
    with jax.enable_x64(True):
        double, x = subjects.in_float64(model), np.asarray(x, np.float64)
        assert subjects.error(jpeft.merge(double)(x), double(x)) < subjects.FLOAT64


def test_the_new_model_shares_the_bases_arrays():
    base = listed()
    adapted = jpeft.adapt(base, lora(), key=KEY)
    kernels = [model.blocks[0].down.kernel[...] for model in (base, adapted)]
    assert kernels[0].unsafe_buffer_pointer() == kernels[1].unsafe_buffer_pointer()
    assert adapted.blocks[0].down.kernel is not base.blocks[0].down.kernel


def test_trained_copies_share_no_buffer_with_the_base():
    """A train step may donate them."""
    model = jpeft.adapt(listed(), lora(bias="all", modules_to_save=["down"]), key=KEY)
    _, trainable, frozen = jpeft.partition(model)
    pointers = {value.unsafe_buffer_pointer() for value in frozen.values()}
    assert not pointers & {value.unsafe_buffer_pointer() for value in trainable.values()}


def test_paths_types_and_attributes_of_the_base_survive():
    base = listed()
    adapted = jpeft.adapt(base, lora(), key=KEY)
    up = adapted.blocks[1].up
    assert isinstance(up, nnx.Linear)
    assert (up.in_features, up.use_bias) == (4, True)
    assert "blocks/1/up/kernel" in jpeft.partition(adapted)[2]
    np.testing.assert_array_equal(up.kernel[...], base.blocks[1].up.kernel[...])


@pytest.mark.parametrize("name", ["", "a/b", "a b", "1", "a.b", "keys", "values", "items", "update", "pop", 3])
def test_a_bad_name_is_an_error(name):
    with pytest.raises(ValueError, match=r"an adapter's name must be an identifier|an adapter cannot be named"):
        jpeft.adapt(listed(), lora(), key=KEY, name=name)


@pytest.mark.parametrize("name", ["a", "A", "B", "saved", "method", "adapters", "名"])
def test_other_names_do(name):
    model = subjects.fill(jpeft.adapt(listed(), lora(), key=KEY, name=name))
    assert f"blocks/0/up/adapters/{name}/A" in trained(model)
    assert_merges(model)


def test_a_second_adapter_of_a_name_is_an_error():
    model = jpeft.adapt(listed(), lora(), key=KEY)
    with pytest.raises(ValueError, match="blocks/0/up already has an adapter 'lora'; pass another name="):
        jpeft.adapt(model, lora(), key=KEY)
    with pytest.raises(ValueError, match="blocks/0/up already has an adapter 'lora'; pass another name="):
        jpeft.adapt(model, lora(targets="all-linear"), key=KEY)
    jpeft.adapt(model, lora(targets=["down"]), key=KEY)  # one name at two places is one adapter in two parts


@pytest.mark.untyped
def test_wrong_types_are_errors():
    with pytest.raises(TypeError, match=r"takes a jpeft method such as jpeft\.LoRA\(\.\.\.\), got <class"):
        jpeft.adapt(listed(), jpeft.LoRA, key=KEY)
    with pytest.raises(TypeError, match=r"takes an nnx\.Module, got dict"):
        jpeft.adapt({}, lora(), key=KEY)
    with pytest.raises(TypeError, match=r"takes a PRNG key, as jax\.random\.key\(0\) is one, got 0"):
        jpeft.adapt(listed(), lora(), key=0)
    with pytest.raises(TypeError, match=r"of several make one: a \| b"):
        jpeft.adapt(listed(), [lora(), lora()], key=KEY)


@pytest.mark.parametrize("make", [listed, stacked])
def test_adapters_compose(make):
    """Two on one module and a third elsewhere: the changes add up, and merge."""
    model = jpeft.adapt(make(), lora(), key=KEY)
    model = jpeft.adapt(model, lora(rank=3, targets="all-linear"), key=KEY, name="second")
    model = subjects.fill(jpeft.adapt(model, lora(targets=["down"], init="pissa"), key=KEY, name="third"))
    assert_merges(model)
    base = subjects.as64(subjects.leaves(make()))
    leaves = subjects.as64(subjects.leaves(model))
    merged = subjects.leaves(jpeft.merge(model))
    for path, kernel in base.items():
        if path.endswith("up/kernel"):
            at = path.removesuffix("kernel") + "adapters"
            expected = (
                kernel
                + 3 / 2 * leaves[f"{at}/lora/A"] @ leaves[f"{at}/lora/B"]
                + 3 / 3 * leaves[f"{at}/second/A"] @ leaves[f"{at}/second/B"]
            )
            assert subjects.error(merged[path], expected) < subjects.MERGED


def test_a_second_adapter_leaves_the_first_as_it_was():
    first = subjects.fill(jpeft.adapt(listed(), lora(), key=KEY))
    second = jpeft.adapt(first, lora(targets=["up"]), key=KEY, name="second")
    np.testing.assert_array_equal(second(X), first(X))
    before, after = subjects.leaves(first), subjects.leaves(second)
    assert all((after[path] == value).all() for path, value in before.items())
    assert trained(first) < trained(second)


def test_merging_and_stripping_are_idempotent_and_leave_the_model():
    model = subjects.fill(jpeft.adapt(listed(), lora(bias="all"), key=KEY))
    before, paths = np.asarray(model(X)), trained(model)
    merged, stripped = jpeft.merge(model), jpeft.strip(model)
    for plain, again in ((merged, jpeft.merge(merged)), (stripped, jpeft.strip(stripped))):
        assert nnx.graphdef(plain) == nnx.graphdef(again)
        np.testing.assert_array_equal(plain(X), again(X))
    assert trained(model) == paths
    np.testing.assert_array_equal(model(X), before)


def test_a_merged_model_is_adapted_anew():
    model = jpeft.merge(subjects.fill(jpeft.adapt(listed(), lora(), key=KEY)))
    again = jpeft.adapt(model, lora(), key=KEY)
    np.testing.assert_array_equal(again(X), model(X))


def test_no_trace_is_left():
    for take_off in (jpeft.merge, jpeft.strip):
        plain = take_off(subjects.fill(jpeft.adapt(stacked(), lora(bias="all"), key=KEY)))
        assert type(plain.blocks.up) is nnx.Linear
        base = dict(nnx.iter_modules(stacked()))
        assert all(vars(module).keys() == vars(base[path]).keys() for path, module in nnx.iter_modules(plain))
        assert b"adapters" not in pickle.dumps(plain)


# Copies of leaves: bias= and modules_to_save=.


@pytest.mark.parametrize("make", [listed, stacked])
@pytest.mark.parametrize("bias, modules", [("lora_only", {"up"}), ("all", {"up", "down"})])
def test_biases(make, bias, modules):
    model = jpeft.adapt(make(), lora(bias=bias), key=KEY)
    saved = {path.split("/adapters/")[0].split("/")[-1] for path in trained(model) if "/saved/bias" in path}
    assert saved == modules
    np.testing.assert_array_equal(model(X), make()(X))
    assert_merges(subjects.fill(model))


def test_the_biases_of_the_adapted_layers_alone():
    """`lora_only` with `layers=` trains the biases of these layers; the copy of the others is never read."""
    base = stacked()
    model = subjects.fill(jpeft.adapt(base, lora(bias="lora_only", layers=[1]), key=KEY))
    assert_merges(model)
    before, after = subjects.leaves(base)["blocks/up/bias"], subjects.leaves(jpeft.merge(model))["blocks/up/bias"]
    assert [bool((before[i] == after[i]).all()) for i in range(3)] == [True, False, True]
    graphdef, trainable, frozen = jpeft.partition(model)
    gradient = jax.grad(lambda t: jpeft.combine(graphdef, t, frozen)(X).sum())(trainable)
    assert [bool(g.any()) for g in gradient["blocks/up/adapters/lora/saved/bias"]] == [False, True, False]


@pytest.mark.parametrize("num_layers", [1, 8])
def test_the_biases_of_some_layers_where_layers_are_as_many_as_features(num_layers):
    base = stacked(num_layers)  # `up` has 8 outputs
    layers = [0] if num_layers == 1 else [0, 5]
    model = subjects.fill(jpeft.adapt(base, lora(bias="lora_only", layers=layers), key=KEY))
    assert_merges(model)
    by_vmap = subjects.Vmapped(4, num_layers, nnx.Rngs(0))
    assert_merges(subjects.fill(jpeft.adapt(by_vmap, lora(bias="lora_only", layers=layers), key=KEY)))


class WithParts(nnx.Module):
    """A head of two modules behind the blocks, and a norm."""

    def __init__(self, rngs):
        self.blocks = nnx.List([subjects.Block(4, rngs)])
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), jnp.tanh, nnx.Linear(6, 2, rngs=rngs))

    def __call__(self, x):
        return self.head(self.norm(self.blocks[0](x)))


def test_modules_trained_whole():
    base = WithParts(nnx.Rngs(0))
    model = jpeft.adapt(base, lora(modules_to_save=["head", "norm"]), key=KEY)
    saved = {path for path in trained(model) if "/saved/" in path}
    assert saved == {
        "head/layers/0/adapters/lora/saved/bias",
        "head/layers/0/adapters/lora/saved/kernel",
        "head/layers/2/adapters/lora/saved/bias",
        "head/layers/2/adapters/lora/saved/kernel",
        "norm/adapters/lora/saved/bias",
        "norm/adapters/lora/saved/scale",
    }
    np.testing.assert_array_equal(model(X), base(X))
    filled = subjects.fill(model)
    assert_merges(filled)
    graphdef, trainable, frozen = jpeft.partition(filled)
    gradients = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(X) ** 2).sum())(trainable)
    assert all(gradients[path].any() for path in saved)


def test_a_saved_module_is_not_adapted_too():
    model = jpeft.adapt(WithParts(nnx.Rngs(0)), lora(targets="all-linear", modules_to_save=["head"]), key=KEY)
    assert not any(path.startswith("head") and path.endswith(("A", "B")) for path in trained(model))


def test_a_bfloat16_copy_is_float32_and_stands_in_as_bfloat16():
    base = nnx.Linear(4, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = jpeft.adapt(base, lora(targets=".*", bias="all"), key=KEY)
    graphdef, trainable, frozen = jpeft.partition(model)
    assert trainable["adapters/lora/saved/bias"].dtype == jnp.float32
    trainable["adapters/lora/saved/bias"] += 1.001
    moved = jpeft.combine(graphdef, trainable, frozen)
    assert jpeft.merge(moved).bias[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved(X), base(X) + jnp.asarray(1.001, jnp.bfloat16).astype(jnp.float32))


class Parameters(nnx.Module):
    """Parameters that its owner reads, and no call."""

    def __init__(self):
        self.bias = nnx.Param(jnp.ones(4))


class HoldsParameters(nnx.Module):
    """Its owner."""

    def __init__(self, rngs):
        self.extra = Parameters()
        self.up = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.up(x) + self.extra.bias[...]


@pytest.mark.parametrize("options", [{"modules_to_save": ["extra"]}, {"bias": "all"}], ids=str)
def test_what_is_not_called_cannot_be_saved(options):
    with pytest.raises(ValueError, match="extra holds parameters but cannot be called"):
        jpeft.adapt(HoldsParameters(nnx.Rngs(0)), lora(**options), key=KEY)


def test_one_leaf_is_not_copied_twice():
    model = jpeft.adapt(listed(), lora(bias="all"), key=KEY)
    with pytest.raises(ValueError, match="blocks/0/up/bias is trained by the adapter 'lora' already"):
        jpeft.adapt(model, lora(bias="lora_only"), key=KEY, name="second")
    with pytest.raises(ValueError, match="blocks/0/down/bias is trained by the adapter 'lora' already"):
        jpeft.adapt(model, lora(modules_to_save=["down"]), key=KEY, name="second")


class Classifier(nnx.Module):
    """A model that says which of its modules is its task's head."""

    def __init__(self, rngs):
        self.blocks = nnx.List([subjects.Block(4, rngs)])
        self.classifier = nnx.Linear(4, 2, rngs=rngs)
        self.task, self.head = "SEQ_CLS", ("classifier",)

    def __call__(self, x):
        return self.classifier(self.blocks[0](x))


def test_a_second_adapter_leaves_the_tasks_head_to_the_first():
    model = Classifier(nnx.Rngs(0))
    first = subjects.fill(jpeft.adapt(model, lora(), key=KEY))
    second = jpeft.adapt(first, lora(targets=["down"]), key=KEY, name="second")
    assert {path for path in trained(second) if "saved" in path} == {path for path in trained(first) if "saved" in path}
    np.testing.assert_array_equal(second(X), first(X))


# As a value: under transformations, copied, pickled, split.


def test_under_jit_and_without_values():
    def build(key):
        model = jpeft.adapt(listed(), lora(init="pissa", bias="all"), key=key)
        return jpeft.partition(model)[1:]

    shapes = jax.eval_shape(build, KEY)
    trainable, _ = jax.jit(build)(KEY)
    _, expected, _ = jpeft.partition(jpeft.adapt(listed(), lora(init="pissa", bias="all"), key=KEY))
    assert shapes[0].keys() == trainable.keys() == expected.keys()
    for path, value in trainable.items():
        assert (shapes[0][path].shape, shapes[0][path].dtype) == (value.shape, value.dtype)
    np.testing.assert_allclose(
        trainable["blocks/0/up/adapters/lora/A"], expected["blocks/0/up/adapters/lora/A"], atol=1e-6
    )


def test_an_abstract_model():
    model = nnx.eval_shape(lambda: jpeft.adapt(stacked(), lora(bias="all", init="olora"), key=KEY))
    assert jpeft.summary(model) == jpeft.summary(jpeft.adapt(stacked(), lora(bias="all", init="olora"), key=KEY))


@pytest.mark.parametrize("make", [listed, stacked])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), nnx.clone, lambda m: nnx.merge(*nnx.split(m))],
    ids=["deepcopy", "copy", "pickle", "clone", "split and merge"],
)
def test_copies(make, duplicate):
    method = lora(bias="lora_only", layers=[1], rank_pattern={"up": 1}, dropout=0.5)
    model = subjects.fill(jpeft.adapt(make(), method, key=KEY))
    other = duplicate(model)
    assert jpeft.partition(other)[0] == jpeft.partition(model)[0]
    np.testing.assert_array_equal(other(X), model(X))
    assert_merges(other)


def test_split_by_type_and_state():
    model = subjects.fill(jpeft.adapt(listed(), lora(), key=KEY))
    graphdef, adapters, rest = nnx.split(model, jpeft.AdapterParam, ...)
    assert len(jax.tree.leaves(adapters)) == len(trained(model))
    np.testing.assert_array_equal(nnx.merge(graphdef, adapters, rest)(X), model(X))
    state = nnx.state(model, jpeft.AdapterParam)
    nnx.update(model, jax.tree.map(jnp.zeros_like, state))
    np.testing.assert_array_equal(model(X), listed()(X))


def test_sites_name_what_can_be_adapted_and_what_is():
    model = jpeft.adapt(stacked(), lora(), key=KEY)
    up, down = sorted((site for site in jpeft.sites(model)), key=lambda site: site.path, reverse=True)
    assert (up.path, up.kind, up.type, up.adapters) == ("blocks/up", "projection", "Linear", ("lora",))
    assert (up.lead, up.d_in, up.d_out, up.names) == ((3,), 4, 8, ("blocks.0.up", "blocks.1.up", "blocks.2.up"))
    assert (down.path, down.adapters) == ("blocks/down", ())


def test_a_bare_projection_is_a_model():
    base = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    model = subjects.fill(jpeft.adapt(base, lora(targets="all-linear"), key=KEY))
    assert trained(model) == {"adapters/lora/A", "adapters/lora/B"}
    assert_merges(model)


def test_a_model_without_a_place_is_an_error():
    with pytest.raises(ValueError, match=r"'all-linear' matches no projection .* nearest: none"):
        jpeft.adapt(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), lora(targets="all-linear"), key=KEY)
