# SPDX-License-Identifier: Apache-2.0
"""BitFit, norm tuning, full fine-tuning and the last layers: trained copies, against torch's autograd and peft."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_oracle as oracle
import pytest
import subjects
import torch_twin
from flax import nnx
from torch_twin import is_head

import jpeft

KEY = jax.random.key(0)


#: family, jpeft's method, which of transformers' parameters it trains
AUTOGRAD = {
    "bitfit": ("bert cls", jpeft.BitFit(), lambda n: n.endswith(".bias") or is_head(n)),
    "bitfit of some": (
        "bert cls",
        jpeft.BitFit(["query", "LayerNorm"], layers=[0, 2], modules_to_save=["pooler"], exclude=["2.output.LayerNorm"]),
        lambda n: is_head(n) or "pooler" in n
        or (n.endswith(".bias") and (".0." in n or ".2." in n) and ("query" in n or "LayerNorm" in n)
            and "2.output.LayerNorm" not in n),
    ),
    "bitfit without the head": ("bert tokens", jpeft.BitFit(modules_to_save=()), lambda n: n.endswith(".bias")),
    "bitfit of llama's queries": ("llama", jpeft.BitFit(), lambda n: n.endswith(".bias")),
    "norms of bert": ("bert cls", jpeft.NormTuning(), lambda n: "LayerNorm" in n or is_head(n)),
    "norms of qwen3": ("qwen3", jpeft.NormTuning(), lambda n: "norm" in n),
    "norms of some layers": ("mistral", jpeft.NormTuning(layers=[1]), lambda n: "norm" in n and ".1." in n),
    "all of bert": ("bert cls", jpeft.FullFineTune(), lambda n: True),
    "all of llama": ("llama", jpeft.FullFineTune(), lambda n: True),
    "all of a tied llama": ("llama tied", jpeft.FullFineTune(), lambda n: True),
    "some of llama": (
        "llama", jpeft.FullFineTune(targets=["v_proj", "norm"], exclude=["0.self_attn.v_proj"]),
        lambda n: (".norm" in n or "v_proj" in n) and "0.self_attn.v_proj" not in n,
    ),
    "the last layer of bert": (
        "bert cls", jpeft.LastLayers(1), lambda n: "layer.2." in n or "pooler" in n or is_head(n)
    ),
    "the last layers of llama": (
        "llama cls", jpeft.LastLayers(2), lambda n: ".1." in n or ".2." in n or n == "model.norm.weight" or is_head(n)
    ),
    "nothing but the last layer": (
        "llama", jpeft.LastLayers(1, targets=r".*(mlp|norm).*", final=()), lambda n: ".2." in n and "self_attn" not in n
    ),
    "the head alone": ("bert cls", jpeft.LastLayers(0, final=()), is_head),
    "what stands behind the layers": ("bert cls", jpeft.LastLayers(0), lambda n: "pooler" in n or is_head(n)),
    "the last layer and the head": (
        "llama", jpeft.LastLayers(1, final=["norm", "lm_head"]),
        lambda n: ".2." in n or n in ("model.norm.weight", "lm_head.weight"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family, method, which", AUTOGRAD.values(), ids=AUTOGRAD)
def test_outputs_and_gradients_are_those_of_torch(family, method, which):
    torch_twin.assert_same(family, method, torch_twin.trained_in(family, which), torch_twin.active_values)


@pytest.mark.parametrize(
    "family, targets",
    {"bert cls": ["LayerNorm"], "llama": None, "mistral": None, "qwen2": ["input_layernorm", "norm"]}.items(),
)
def test_norms_are_those_of_peft(family, targets):
    config = peft.LNTuningConfig(task_type=oracle.FAMILIES[family][1], target_modules=targets)
    method = jpeft.NormTuning(targets=targets)
    torch_twin.assert_same(family, method, torch_twin.get_peft(family, config), torch_twin.active_values)


BERT_BASE = {"model_type": "bert"}
#: method, task, trained parameters of bert-base-uncased
D, FF, V = 768, 3072, 30522
LAYER = 4 * (D * D + D) + (D * FF + FF) + (FF * D + D) + 4 * D
EMBEDDINGS = (V + 512 + 2) * D + 2 * D
BIASES = 12 * (4 * D + FF + D + 2 * D) + D  # projections and norms of the layers, the norm of the embeddings
COUNTS = [
    (jpeft.BitFit(), "FEATURE_EXTRACTION", BIASES + D),
    (jpeft.BitFit(modules_to_save=()), "SEQ_CLS", BIASES + D + 2),
    (jpeft.BitFit(), "SEQ_CLS", BIASES + D + 2 * D + 2),
    (jpeft.NormTuning(), "FEATURE_EXTRACTION", 25 * 2 * D),
    (jpeft.FullFineTune(), "FEATURE_EXTRACTION", EMBEDDINGS + 12 * LAYER + D * D + D),
    (jpeft.LastLayers(2), "FEATURE_EXTRACTION", 2 * LAYER + D * D + D),
    (jpeft.LastLayers(3, final=()), "SEQ_CLS", 3 * LAYER + 2 * D + 2),
]


@pytest.mark.parametrize("method, task, trained", COUNTS, ids=str)
def test_counts(method, task, trained):
    model = nnx.eval_shape(lambda: jpeft.adapt(jpeft.models.build(BERT_BASE, task, key=KEY), method, key=KEY))
    summary = jpeft.summary(model)
    assert (summary.trainable, summary.changed) == (trained, trained)


def test_the_named_counts():
    assert BIASES + D == 102_912
    assert EMBEDDINGS + 12 * LAYER + D * D + D == 109_482_240


def test_layers_below_have_no_gradient_and_merged_is_unmerged_bit_for_bit():
    base = oracle.jax_model("bert cls")
    model = subjects.fill(jpeft.adapt(base, jpeft.LastLayers(1), key=KEY))
    graphdef, trainable, frozen = jpeft.partition(model)
    run = jax.jit(lambda m: m(oracle.IDS, oracle.MASK))
    np.testing.assert_array_equal(run(jpeft.merge(model)), run(model))
    gradients = jax.jit(jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(oracle.IDS) ** 2).sum()))(trainable)
    stacked = [path for path in gradients if path.startswith("layers/")]
    assert stacked
    for path in stacked:
        assert not np.asarray(gradients[path])[:2].any(), path
        assert np.asarray(gradients[path])[2].any(), path
    before, after = subjects.leaves(base), subjects.leaves(jpeft.merge(model))
    for path in (path for path in before if path.startswith("layers/")):
        np.testing.assert_array_equal(after[path][:2], before[path][:2])
    (row,) = jpeft.summary(model).rows
    assert row.seams == 10  # 6 projections and 2 norms of one layer, pooler, classifier


class Norms(nnx.Module):
    """Every kind of norm of NNX, one of somebody's own, and things that are none."""

    def __init__(self, rngs):
        self.layer = nnx.LayerNorm(4, rngs=rngs)
        self.rms = nnx.RMSNorm(4, rngs=rngs)
        self.group = nnx.GroupNorm(4, 2, rngs=rngs)
        self.instance = nnx.InstanceNorm(4, rngs=rngs)
        self.batch = nnx.BatchNorm(4, rngs=rngs, use_running_average=True)
        self.own = MyRMSNorm()
        self.plain = nnx.LayerNorm(4, use_bias=False, use_scale=False, rngs=rngs)
        self.normal = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        for module in (self.layer, self.rms, self.instance, self.batch, self.own, self.plain, self.normal):
            x = module(x)
        return self.group(x)


class MyRMSNorm(nnx.Module):
    """Somebody's own."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(4))

    def __call__(self, x):
        return x * self.weight[...].reshape((1,) * (x.ndim - 1) + (4,))


def test_norms_are_known_by_their_class():
    model = jpeft.adapt(Norms(nnx.Rngs(0)), jpeft.NormTuning(), key=KEY)
    trained = {path.replace("/adapters/norm_tuning/saved", "") for path in jpeft.partition(model)[1]}
    both = {f"{name}/{leaf}" for name in ("layer", "group", "instance", "batch") for leaf in ("scale", "bias")}
    assert trained == both | {"rms/scale", "own/weight"}
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    model = subjects.fill(model)
    np.testing.assert_array_equal(jpeft.merge(model)(x), model(x))


class Several(nnx.Module):
    """Two stacks of layers, and parameters of an unusual kind."""

    def __init__(self, rngs):
        self.encoder = subjects.ListOfLayers(4, 3, rngs)
        self.decoder = subjects.ListOfLayers(4, 2, rngs)

    def __call__(self, x):
        return self.decoder(self.encoder(x))


class Loose(nnx.Module):
    """Parameters that no module holds itself, that cannot stand in, that are no real numbers, that two share."""

    def __init__(self, kind):
        self.up = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        if kind == "list":
            self.loose = nnx.data([nnx.Param(jnp.ones(4))])
        if kind == "dict":
            self.held = nnx.Dict(a=nnx.Param(jnp.ones(4)))
        if kind == "codes":
            self.up.kernel = nnx.Param(jnp.ones((4, 4), jnp.int8))
        if kind == "shared":
            self.down = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.down.bias = self.up.bias
        if kind == "root":
            self.offset = nnx.Param(jnp.ones(4))

    def __call__(self, x):
        return self.hidden(x)

    def hidden(self, x):
        return self.up(x) + (self.offset[...][None] if hasattr(self, "offset") else 0.0)


def test_a_models_own_parameters_are_trained_too():
    model = subjects.fill(jpeft.adapt(Loose("root"), jpeft.FullFineTune(), key=KEY))
    x = np.ones((2, 4), np.float32)
    merged = jpeft.merge(model)
    assert not np.array_equal(merged.offset[...], model.offset[...])
    np.testing.assert_array_equal(merged(x), model(x))
    np.testing.assert_array_equal(merged(x), model.hidden(x))


class NamedTwice(nnx.Module):
    """A module of one name in the layers and behind them."""

    def __init__(self, rngs):
        self.blocks = nnx.List([subjects.Block(4, rngs) for _ in range(2)])
        self.up = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.up(x)


blocks = subjects.ListOfLayers(4, 3, nnx.Rngs(0))
twice = NamedTwice(nnx.Rngs(0))
WRONG = [
    (Loose("list"), jpeft.FullFineTune(), "the parameter loose/0 is no attribute of a module, so no copy of it can"),
    (Loose("dict"), jpeft.FullFineTune(), "held holds parameters but cannot be called"),
    (Loose("codes"), jpeft.FullFineTune(), "up/kernel is int8, of which no copy can be trained"),
    (Loose("shared"), jpeft.BitFit(), "down and up share one parameter, bias"),
    (oracle.jax_model("mistral"), jpeft.BitFit(), "what a module with a bias holds, and the model has none"),
    (
        blocks,
        jpeft.NormTuning(),
        r"what a norm \(a module whose class is called ...Norm\) holds, and the model has none",
    ),
    (blocks, jpeft.BitFit(targets=["upp"]), "target 'upp' matches no module with a bias of the model; nearest: .*up"),
    (blocks, jpeft.BitFit(targets=["up"], layers=[3]), r"layers=\[3\]: the targets stand in layers \[0, 1, 2\]"),
    (blocks, jpeft.BitFit(exclude=".*"), r"matches no module with a bias of the model that is not left out again"),
    (blocks, jpeft.FullFineTune(targets=["blocks.0"]), "matches blocks/0, a Block, which is no module with parameters"),
    (blocks, jpeft.LastLayers(4, final=()), "the last 4 layers are asked for, and blocks has 3"),
    (blocks, jpeft.LastLayers(0, final=()), "LastLayers.*would train nothing: the model has no part that it selects"),
    (blocks, jpeft.LastLayers(1), "does not know what stands behind the layers of model type None .*pass final="),
    (twice, jpeft.LastLayers(1, final=["norm"]), "'norm' matches no module with parameters outside of the layers of"),
    (twice, jpeft.LastLayers(1, final=["down"]), "a Linear, which is no module with parameters outside of the layers;"),
    (blocks, jpeft.LastLayers(1, final=["up"]), "a module with parameters outside of the layers holds, and the model"),
    (Loose("root"), jpeft.LastLayers(1, final=()), "the last 1 layers are asked for, and the model has no layers"),
    (
        Several(nnx.Rngs(0)),
        jpeft.LastLayers(1, final=()),
        r"layers in decoder.blocks, encoder.blocks: name one of these",
    ),
]


@pytest.mark.parametrize("model, method, message", WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_trained_is_an_error(model, method, message):
    with pytest.raises(ValueError, match=message):
        jpeft.adapt(model, method, key=KEY)


def test_what_stands_behind_the_layers_is_meant_there_alone():
    model = jpeft.adapt(twice, jpeft.LastLayers(1, final=["up"]), key=KEY)
    assert {path.split("/adapters/")[0] for path in jpeft.partition(model)[1]} == {
        "blocks/1/up", "blocks/1/down", "up"
    }  # fmt: skip


def test_one_of_two_stacks_is_named():
    method = jpeft.LastLayers(1, targets=r"decoder\..*", final=())
    model = jpeft.adapt(Several(nnx.Rngs(0)), method, key=KEY)
    assert {path.split("/adapters/")[0] for path in jpeft.partition(model)[1]} == {
        "decoder/blocks/1/up", "decoder/blocks/1/down"
    }  # fmt: skip


@pytest.mark.untyped
@pytest.mark.parametrize("n", [-1, 1.0, True, None, "2"])
def test_n_is_a_whole_number(n):
    with pytest.raises(ValueError, match="LastLayers's n must be a whole number of at least 0, got"):
        jpeft.LastLayers(n)


def test_a_leaf_is_copied_once():
    model = jpeft.adapt(blocks, jpeft.BitFit(), key=KEY)
    with pytest.raises(ValueError, match="blocks/0/down/bias is trained by the adapter 'bitfit' already, whose copy a"):
        jpeft.adapt(model, jpeft.FullFineTune(), key=KEY)
    both = subjects.fill(jpeft.adapt(model, jpeft.LoRA(rank=2, alpha=3, targets="all-linear"), key=KEY))
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    assert subjects.error(jpeft.merge(both)(x), both(x)) < subjects.FLOAT32
