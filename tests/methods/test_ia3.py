# SPDX-License-Identifier: Apache-2.0
"""(IA)³ against the real peft, a float64 formula, and its counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_oracle as oracle
import pytest
import subjects
import torch_twin
from flax import nnx

import jpeft
from jpeft import seams

KEY = jax.random.key(0)

#: family, jpeft's options, peft's
REAL = {
    "bert": ("bert cls", {}, {}),
    "a head left alone": ("bert tokens", {"exclude": ["layer.0.attention.self.key"]},
                          {"exclude_modules": ["layer.0.attention.self.key"]}),
    "llama, whose keys have a bias": ("llama", {}, {}),
    "deberta, whose keys read distances too": ("deberta", {}, {}),
    "mistral": ("mistral", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "targets": ("bert", {"targets": ["query", "intermediate.dense", "output.dense"], "feedforward": ["output.dense"]},
                {"target_modules": ["query", "intermediate.dense", "output.dense"],
                 "feedforward_modules": ["output.dense"]}),
    "a regular expression": ("llama", {"targets": r".*(0.*o_proj|[12].*down_proj)", "feedforward": r".*down_proj"},
                             {"target_modules": r".*(0.*o_proj|[12].*down_proj)",
                              "feedforward_modules": r".*down_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("family, options, theirs", REAL.values(), ids=REAL)
def test_outputs_and_gradients_are_those_of_peft(family, options, theirs):
    task = oracle.FAMILIES[family][1]
    twin = torch_twin.get_peft(family, peft.IA3Config(task_type=task, **theirs))
    shapes = {torch_twin.plain_name(n): p.shape for n, p in twin.named_parameters()}

    torch_twin.assert_same(family, jpeft.IA3(**options), twin, functools.partial(torch_twin.ia3_values, shapes))


def numpy_blocks(flat, x, num_layers, scaled, adapted):
    """`x + down(tanh(up(x) * l_up) * l_down)` per layer, the vectors in the layers `adapted` alone."""
    for i in range(num_layers):
        leaf = lambda name, i=i: flat[f"blocks/{name}"][i]  # noqa: E731
        up = x @ leaf("up/kernel") + leaf("up/bias")
        if i in adapted and "up" in scaled:
            up = up * leaf("up/adapters/ia3/scale")
        h = np.tanh(up)
        if i in adapted and "down" in scaled:
            h = h * leaf("down/adapters/ia3/scale")
        x = x + h @ leaf("down/kernel") + leaf("down/bias")
    return x


def as_stack(flat, num_layers):
    """The leaves of a list of layers as those of a stack, ones where a layer has no adapter."""
    names = sorted({path.split("/", 2)[2] for path in flat if path.startswith("blocks/")})
    some = {name: next(v for p, v in flat.items() if p.endswith("/" + name)) for name in names}
    return {
        f"blocks/{name}": np.stack(
            [flat.get(f"blocks/{i}/{name}", np.ones_like(some[name])) for i in range(num_layers)]
        )
        for name in names
    }


@pytest.mark.parametrize("layers", [None, [1], [0, 2]], ids=str)
@pytest.mark.parametrize("build", [subjects.Stacked, subjects.ListOfLayers, subjects.Vmapped])
def test_it_is_the_formula_in_float64(build, layers):
    adapted = range(3) if layers is None else layers
    with jax.enable_x64(True):
        method = jpeft.IA3(targets=["up", "down"], feedforward=["down"], layers=layers)
        model = subjects.in_float64(subjects.fill(jpeft.adapt(build(5, 3, nnx.Rngs(0)), method, key=KEY)))
        graphdef, trainable, frozen = jpeft.partition(model)
        x = np.random.default_rng(0).standard_normal((2, 3, 5))
        flat = subjects.as64(subjects.leaves(model))
        flat = as_stack(flat, 3) if build is subjects.ListOfLayers else flat
        expected = numpy_blocks(flat, x, 3, ("up", "down"), adapted)
        assert subjects.error(model(x), expected) < subjects.FLOAT64
        assert subjects.error(jpeft.merge(model)(x), expected) < subjects.FLOAT64
        gradients = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(x) ** 2).sum())(trainable)
        leaves = {path: value for path, value in flat.items() if path.endswith("scale")}
        exact = subjects.complex_step(
            lambda f: (numpy_blocks({**flat, **f}, x, 3, ("up", "down"), adapted) ** 2).sum(), leaves
        )
        got = {path: np.asarray(value) for path, value in gradients.items()}
        got = got if build is not subjects.ListOfLayers else _stacked_gradients(got)
        for path, value in exact.items():
            assert subjects.error(got[path], value) < 1e3 * subjects.FLOAT64, path


def _stacked_gradients(flat):
    names = {path.split("/", 2)[2] for path in flat}
    any_of = {name: next(v for p, v in flat.items() if p.endswith("/" + name)) for name in names}
    return {
        f"blocks/{name}": np.stack([flat.get(f"blocks/{i}/{name}", np.zeros_like(any_of[name])) for i in range(3)])
        for name in names
    }


class Heads(nnx.Module):
    """Einsums whose kernels and outputs have their axes in another order, and a convolution."""

    def __init__(self, rngs):
        normal = nnx.initializers.normal()
        self.split = nnx.Einsum("btd,dnh->bthn", (6, 2, 3), (3, 2), rngs=rngs, bias_init=normal)
        self.join = nnx.Einsum("bthn,nhd->btd", (2, 3, 6), (6,), rngs=rngs, bias_init=normal)
        self.conv = nnx.Conv(6, 4, (3,), rngs=rngs, bias_init=normal)
        self.general = nnx.LinearGeneral((2, 2), (3, 5), axis=(-2, -1), rngs=rngs, bias_init=normal)

    def __call__(self, x):
        y = self.conv(self.join(jnp.tanh(self.split(x))))
        return self.general(y.reshape(*y.shape[:2], 2, 2))


def test_kernels_of_any_layout_are_scaled_and_merged():
    targets = ["split", "join", "conv", "general"]
    method = jpeft.IA3(targets=targets, feedforward=["join", "general"])
    x = np.random.default_rng(0).standard_normal((2, 5, 6))
    with jax.enable_x64(True):
        model = subjects.in_float64(subjects.fill(jpeft.adapt(Heads(nnx.Rngs(0)), method, key=KEY)))
        f = {name: subjects.as64(subjects.leaves(getattr(model, name))) for name in targets}
        scale = {name: f[name]["adapters/ia3/scale"] for name in targets}
        assert {name: s.shape for name, s in scale.items()} == {
            "split": (6,),
            "join": (6,),
            "conv": (4,),
            "general": (4,),
        }
        h = np.einsum("btd,dnh->bthn", x, f["split"]["kernel"]) + f["split"]["bias"]
        h = np.tanh(h * scale["split"].reshape(2, 3).T)
        y = np.einsum("bthn,nhd->btd", h * scale["join"].reshape(2, 3).T, f["join"]["kernel"]) + f["join"]["bias"]
        y = np.asarray(jpeft.strip(model).conv(jnp.asarray(y))) * scale["conv"]
        y = (y * scale["general"]).reshape(2, 5, 2, 2)
        y = np.einsum("btij,ijkl->btkl", y, f["general"]["kernel"]) + f["general"]["bias"]
        assert subjects.error(model(x), y) < subjects.FLOAT64
        assert subjects.error(jpeft.merge(model)(x), y) < subjects.FLOAT64


def test_adapterhubs_placement_is_before_the_activation():
    """AdapterHub: gamma((x W1 + b1) * l); the paper and peft: gamma(x W1 + b1) * l. They are two functions."""
    model = oracle.jax_model("bert")
    hub = jpeft.adapt(model, jpeft.IA3(placement="adapterhub"), key=KEY)
    assert _adapted(hub) == {"attention/self/key", "attention/self/value", "intermediate/dense"}
    assert _adapted(jpeft.adapt(model, jpeft.IA3(), key=KEY)) == {
        "attention/self/key", "attention/self/value", "attention/output/dense", "output/dense"
    }  # fmt: skip
    paper = jpeft.adapt(model, jpeft.IA3(placement="paper"), key=KEY)
    assert _adapted(paper) == {"attention/self/key", "attention/self/value", "output/dense"}
    scale = 1 + 0.5 * np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    hub.layers.intermediate.dense.adapters["ia3"].scale.set_value(jnp.asarray(scale))
    paper.layers.output.dense.adapters["ia3"].scale.set_value(jnp.asarray(scale))
    assert subjects.error(hub(oracle.IDS, oracle.MASK), paper(oracle.IDS, oracle.MASK)) > 1e-2
    merged = jpeft.merge(hub)
    own = model.layers.intermediate.dense
    np.testing.assert_allclose(merged.layers.intermediate.dense.bias[...], own.bias[...] * scale, rtol=1e-6)


def test_in_a_gated_block_adapterhubs_placement_is_the_papers():
    model = oracle.jax_model("llama")
    hub, paper = (jpeft.adapt(model, jpeft.IA3(placement=p), key=KEY) for p in ("adapterhub", "paper"))
    scale = jnp.asarray(1 + 0.5 * np.random.default_rng(0).standard_normal((3, 20)), jnp.float32)
    hub.layers.mlp.up_proj.adapters["ia3"].scale.set_value(scale)
    paper.layers.mlp.down_proj.adapters["ia3"].scale.set_value(scale)
    assert subjects.error(hub(oracle.IDS), paper(oracle.IDS)) < torch_twin.THROUGH


def _adapted(model):
    return {path.split("/adapters/")[0].removeprefix("layers/") for path in jpeft.partition(model)[1]}


def count(config, method, task):
    return jpeft.summary(
        nnx.eval_shape(lambda: jpeft.adapt(jpeft.models.build(config, task, key=KEY), method, key=KEY))
    )


LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip


def test_counts():
    bert = count({"model_type": "bert"}, jpeft.IA3(placement="adapterhub"), "FEATURE_EXTRACTION")
    assert bert.trainable == 12 * (768 + 768 + 3072) == 55_296
    assert bert.changed == 12 * (2 * 768 * 769 + 3072 * 769)  # kernels and biases
    llama = count(LLAMA_2_7B, jpeft.IA3(), "CAUSAL_LM")
    assert llama.trainable == 32 * (4096 + 4096 + 11008) == 614_400
    assert llama.changed == 32 * (2 * 4096 * 4096 + 11008 * 4096)


WRONG = [
    ({"feedforward": ["down"], "targets": ["up"]}, "feedforward 'down' is none of the targets up; name it there too"),
    ({"feedforward": ["up"]}, "feedforward 'up' is none of the targets key, value, output.dense"),
    ({"placement": "pfeiffer"}, "IA3's placement must be one of peft, paper, adapterhub; got 'pfeiffer'"),
    ({"placement": "paper", "targets": ["key"], "feedforward": ()}, "placement='paper' picks defaults, and targets="),
    ({"targets": ".*key", "feedforward": "a/b"}, "is one for names, got the path 'a/b'; list paths"),
    ({"targets": ".*key", "feedforward": ".*dense"}, r"the key '\.\*dense' .*matches the end of no adapted"),
    ({"targets": ["key", "word_embeddings"], "feedforward": ["word_embeddings"]}, "lookup, whose input is no vector"),
    (
        {"targets": ".*(key|value)", "feedforward": r".*0.*key"},
        "matches layers/attention/self/key in some of its layers",
    ),
    ({"targets": ".*key", "layers": [1]}, "with a regular expression, say the layers in it"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=lambda v: str(v) if isinstance(v, dict) else "")
@pytest.mark.untyped
def test_a_wrong_option_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.adapt(oracle.jax_model("bert"), jpeft.IA3(**options), key=KEY)


@pytest.mark.parametrize("options, name", [({}, "targets"), ({"targets": ["up"]}, "feedforward")], ids=str)
def test_a_model_of_unknown_type_needs_to_be_told(options, name):
    with pytest.raises(
        ValueError, match=f"IA3 knows no default {name} of placement 'peft' for model type None .*pass "
    ):
        jpeft.adapt(subjects.Stacked(4, 2, nnx.Rngs(0)), jpeft.IA3(**options), key=KEY)


def test_a_bias_of_another_size_has_no_merged_form():
    class Coarse(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Einsum("bd,dnh->bnh", (4, 2, 3), (1, 3), rngs=rngs)

        def __call__(self, x):
            return self.up(x)

    model = jpeft.adapt(Coarse(nnx.Rngs(0)), jpeft.IA3(targets=["up"], feedforward=()), key=KEY)
    with pytest.raises(ValueError, match=r"up adds a bias of 3 entries to 6 outputs, .* has no merged form"):
        jpeft.merge(model)


def test_a_convolutions_input_is_not_scaled():
    model = Heads(nnx.Rngs(0))
    assert isinstance(seams.projection(model.conv), seams.Convolution)
    with pytest.raises(ValueError, match=r"conv is a convolution, whose input is no vector .*out of feedforward="):
        jpeft.adapt(model, jpeft.IA3(targets=["conv"], feedforward=["conv"]), key=KEY)


class Tied(nnx.Module):
    """A table that is its own output head."""

    def __init__(self):
        self.table = nnx.Embed(7, 4, rngs=nnx.Rngs(0))

    def __call__(self, ids):
        return self.table.attend(self.table(ids))


@pytest.mark.parametrize("first", [jpeft.LoRA, jpeft.LoHa, jpeft.DoRA], ids=lambda method: method.__name__)
def test_behind_another_at_a_tied_head_it_scales_both(first):
    """Logits are (t[ids]) tᵀ of t = (table with the first in it) * l; of half of IA3, with 1 + (l - 1) / 2."""
    ids, ours = np.array([0, 3, 6]), {"targets": ["table"]}
    both = first(rank=2, alpha=3, **ours) | jpeft.IA3(**ours, feedforward=())
    with jax.enable_x64(True):
        model = subjects.in_float64(subjects.fill(jpeft.adapt(Tied(), both, key=KEY)))
        one = jpeft.merge(jpeft.disable(model, "ia3"))
        table = np.asarray(one.table.embedding[...])
        scale = np.asarray(jpeft.partition(model)[1]["table/adapters/ia3/scale"])
        for strength, got in ((1.0, model), (0.5, jpeft.scale(model, 0.5, "ia3"))):
            t = table * (1 + strength * (scale - 1))
            assert subjects.error(got(ids), t[ids] @ t.T) < subjects.FLOAT64
        assert subjects.error(jpeft.merge(model)(ids), model(ids)) < subjects.FLOAT64
        bank = jpeft.bank([model])
        rows = jpeft.apply_bank(bank, np.array([1, 0, 1]), lambda model, ids: model(ids), ids)
        assert subjects.error(rows[0], np.asarray(model(ids[:1]))[0]) < subjects.FLOAT64
        assert subjects.error(rows[1], np.asarray(jpeft.strip(model)(ids[1:2]))[0]) < subjects.FLOAT64
