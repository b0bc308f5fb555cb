# SPDX-License-Identifier: Apache-2.0
"""Selecting modules: PEFT's rules against the real peft, and an error for every selection that is not what it says."""

import types
import warnings
from typing import Any

import jax
import pytest
import subjects
import torch
from flax import nnx
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PretrainedConfig, PreTrainedModel

import jpeft
from jpeft._stack import stack
from jpeft._targets import matches

KEY = jax.random.key(0)
NUM_LAYERS = 3


class TorchLayer(torch.nn.Module):
    """One layer, with Hugging Face's names."""

    def __init__(self):
        super().__init__()
        self.self_attn = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj")})
        self.mlp = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("up_proj", "down_proj")})
        self.norm = torch.nn.LayerNorm(4)


class TorchModel(PreTrainedModel):
    """A decoder's tree of modules."""

    config_class = PretrainedConfig

    def __init__(self):
        super().__init__(PretrainedConfig(tie_word_embeddings=False))  # type: ignore[call-arg]
        layers = torch.nn.ModuleList([TorchLayer() for _ in range(NUM_LAYERS)])
        self.model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(5, 4), "layers": layers})
        self.lm_head = torch.nn.Linear(4, 5, bias=False)

    def get_output_embeddings(self):
        return self.lm_head


class Attention(nnx.Module):
    """Its twin in NNX."""

    def __init__(self, rngs):
        self.q_proj, self.k_proj, self.v_proj = (nnx.Linear(4, 4, rngs=rngs) for _ in range(3))


class Mlp(nnx.Module):
    """Its twin in NNX."""

    def __init__(self, rngs):
        self.up_proj, self.down_proj = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))


class Layer(nnx.Module):
    """Its twin in NNX."""

    def __init__(self, rngs):
        self.self_attn, self.mlp, self.norm = Attention(rngs), Mlp(rngs), nnx.LayerNorm(4, rngs=rngs)


class Listed(nnx.Module):
    """The decoder with its layers in a list, under the same names."""

    def __init__(self, rngs):
        layers = nnx.List([Layer(rngs) for _ in range(NUM_LAYERS)])
        self.model = nnx.Dict(embed_tokens=nnx.Embed(5, 4, rngs=rngs), layers=layers)
        self.lm_head = nnx.Linear(4, 5, use_bias=False, rngs=rngs)
        self.head = ("lm_head",)


class Stacked(nnx.Module):
    """The decoder with stacked layers and paths of its own, which `module_names` maps."""

    def __init__(self, rngs):
        self.embed_tokens = nnx.Embed(5, 4, rngs=rngs)
        self.layers = stack(Layer, NUM_LAYERS, rngs)
        self.lm_head = nnx.Linear(4, 5, use_bias=False, rngs=rngs)
        self.head = ("lm_head",)

    def module_names(self):
        inside = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "mlp/up_proj", "mlp/down_proj", "norm")
        named = {
            f"layers/{path}": tuple(f"model.layers.{i}.{path.replace('/', '.')}" for i in range(NUM_LAYERS))
            for path in inside
        }
        return named | {"embed_tokens": ("model.embed_tokens",), "lm_head": ("lm_head",)}


MODELS = {"listed": Listed, "stacked": Stacked}


@pytest.fixture(scope="module", params=MODELS, name="model")
def _model(request):
    return MODELS[request.param](nnx.Rngs(0))


def peft_names(targets, layers=None, exclude=None, modules_to_save=None):
    """The same of the real peft."""
    config = LoraConfig(
        r=1,
        target_modules=targets,
        layers_to_transform=layers,
        exclude_modules=exclude,
        modules_to_save=modules_to_save,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = inject_adapter_in_model(config, TorchModel())
    return {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")} | {
        name.removesuffix(".lora_embedding_A")
        for name, _ in model.named_modules()
        if name.endswith(".lora_embedding_A") and "default" not in name and "embed" in name
    }


SELECTIONS = [
    {"targets": ["q_proj"]},
    {"targets": ["q_proj", "v_proj"]},
    {"targets": ["proj"], "wrong": True},
    {"targets": ["self_attn.q_proj"]},
    {"targets": ["model.layers.1.self_attn.q_proj"]},
    {"targets": ["layers.2.mlp.up_proj", "k_proj"]},
    {"targets": ["embed_tokens", "lm_head"]},
    {"targets": ["lm_head"]},
    {"targets": "q_proj", "wrong": True},
    {"targets": ".*q_proj"},
    {"targets": r"model\.layers\.[02]\..*", "wrong": True},
    {"targets": ["q_proj", "norm"], "wrong": True},
    {"targets": ["q_porj"], "wrong": True},
    {"targets": r"model\.layers\.[02]\..*_proj"},
    {"targets": r"model\.layers\.[02]\..*_proj|.*norm", "exclude": ["norm"]},
    {"targets": r".*\.(q|k)_proj"},
    {"targets": r"(?!.*\.1\.).*_proj"},
    {"targets": r"(?!.*lm_head|.*self_attn).*(proj|head|embed_tokens)"},
    {"targets": "all-linear"},
    {"targets": "ALL-Linear"},
    {"targets": "all-linear", "exclude": ["q_proj"]},
    {"targets": ["q_proj", "up_proj"], "layers": [0, 2]},
    {"targets": ["q_proj", "up_proj"], "layers": 1},
    {"targets": ["model.layers.2.self_attn.q_proj", "v_proj"], "layers": [0]},
    {"targets": ["q_proj", "v_proj"], "exclude": ["layers.1.self_attn.v_proj"]},
    {"targets": ["q_proj", "v_proj"], "exclude": r".*\.0\..*"},
    {"targets": ["q_proj", "v_proj"], "exclude": ["model.layers.0.self_attn.q_proj", "v_proj"]},
    {"targets": ".*_proj", "exclude": ["self_attn.q_proj", "down_proj"]},
    {"targets": ["q_proj", "v_proj"], "exclude": ["v_proj"], "layers": [2]},
    {"targets": "all-linear", "modules_to_save": ["lm_head"]},
    {"targets": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("selection", [s for s in SELECTIONS if "wrong" not in s], ids=str)
def test_a_selection_is_that_of_peft(model, selection):
    assert subjects.adapted_names(model, **selection) == peft_names(**selection)


@pytest.mark.parametrize("selection", [s for s in SELECTIONS if "wrong" in s], ids=str)
def test_what_peft_refuses_or_cannot_adapt_is_an_error(model, selection):
    selection = {key: value for key, value in selection.items() if key != "wrong"}
    with pytest.raises(ValueError, match=r"[Tt]arget"):
        peft_names(**selection)
    with pytest.raises(ValueError, match="target"):
        subjects.adapted_names(model, **selection)


NAMES = [
    *(f"model.layers.{i}.self_attn.{p}" for i in (0, 1, 11) for p in ("q_proj", "qkv_proj", "q_proj2")),
    "q_proj",
    "model.q_proj.inner",
    "lm_head",
    "model.layers.1.experts.3.up_proj",
]
PATTERNS = [
    ["q_proj"],
    ["proj"],
    ["self_attn.q_proj", "lm_head"],
    ["1.self_attn.q_proj"],
    ["q_pro."],
    "q_proj",
    r".*\.q_proj",
    r".*q_proj.*",
    r"model\.layers\.1\..*",
    r"model.layers.1.*",
    r"(?!.*11).*q_proj",
    r"^model\.(.*)\.q_proj$",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_matching_is_that_of_peft(pattern):
    for name in NAMES:
        config = LoraConfig(target_modules=pattern)
        expected = bool(check_target_module_exists(config, name))
        given = pattern if isinstance(pattern, str) else tuple(pattern)
        assert matches(given, name, name.replace(".", "/")) == expected, name


@pytest.mark.parametrize("layers", [[0], [1], [3], [1, 11]], ids=str)
def test_the_layer_is_the_first_number_of_a_name_as_in_peft(layers):
    from jpeft._method import Targets
    from jpeft._targets import _in_layers

    config = LoraConfig(target_modules=["q_proj", "up_proj", "lm_head"], layers_to_transform=layers)
    asked = Targets(("q_proj", "up_proj", "lm_head"), layers=tuple(layers))
    for name in NAMES:
        if any(name.endswith(f".{target}") for target in asked.targets):
            assert _in_layers(asked, name) == bool(check_target_module_exists(config, name)), name


def test_all_linear_takes_layers_where_peft_refuses_them(model):
    assert subjects.adapted_names(model, targets="all-linear", layers=[1]) == {
        f"model.layers.1.{name}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    }


def test_the_layer_of_a_list_at_the_root_counts_too():
    """peft wants a part before the list's name (`model.layers.0`) and finds no layer here."""
    model = subjects.ListOfLayers(4, 3, nnx.Rngs(0))
    assert subjects.adapted_names(model, targets=["up"], layers=[0, 2]) == {"blocks.0.up", "blocks.2.up"}


def test_defaults_by_model_type(model):
    model = nnx.clone(model)
    for known in ("llama", "mistral", "qwen2", "qwen3"):
        model.config = types.SimpleNamespace(model_type=known)
        assert subjects.adapted_names(model) == subjects.adapted_names(model, targets=["q_proj", "v_proj"])
    model.config = types.SimpleNamespace(model_type="mamba")
    with pytest.raises(ValueError, match=r"no default targets for model type 'mamba' .*llama.*pass targets="):
        subjects.adapted_names(model)
    del model.config
    with pytest.raises(ValueError, match="no default targets for model type None"):
        subjects.adapted_names(model)


def test_an_entry_with_a_slash_is_an_nnx_path():
    model = Stacked(nnx.Rngs(0))
    everywhere = {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    assert subjects.adapted_names(model, targets=["layers/self_attn/q_proj"]) == everywhere
    assert subjects.adapted_names(model, targets=["self_attn/q_proj"]) == everywhere
    assert subjects.adapted_names(model, targets=r"layers/.*/q_proj") == everywhere
    assert subjects.adapted_names(subjects.Stacked(4, 2, nnx.Rngs(0)), targets=["blocks/up"]) == {
        "blocks.0.up",
        "blocks.1.up",
    }


def test_a_pattern_for_names_does_not_reach_through_the_path():
    """`layers/self_attn/q_proj` holds no number, so a lookahead that excludes layer 0 would match it."""
    names = subjects.adapted_names(Stacked(nnx.Rngs(0)), targets=r"(?!.*\.0\.).*q_proj")
    assert names == {"model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj"}


def test_a_stack_that_is_one_projection_goes_by_its_own_name():
    class Bare(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.vmap(lambda r: nnx.Linear(4, 4, rngs=r))(rngs.split(2))

    assert subjects.adapted_names(Bare(nnx.Rngs(0)), targets=["blocks"]) == {"blocks.0", "blocks.1"}
    root = nnx.vmap(lambda r: nnx.Linear(4, 4, rngs=r))(nnx.Rngs(0).split(2))
    assert subjects.adapted_names(root, targets="all-linear") == {"0", "1"}


def test_a_set_of_targets_is_one_selection_in_any_order():
    assert (
        jpeft.LoRA(targets={"a", "b", "c"})
        == jpeft.LoRA(targets={"c", "b", "a"})
        == jpeft.LoRA(targets=["a", "b", "c"])
    )


WRONG = [
    ({"targets": ["q_porj"]}, "target 'q_porj' matches no projection of the model; nearest: .*q_proj"),
    ({"targets": ["q_proj", "v_porj"]}, "target 'v_porj' matches no projection of the model; nearest: .*v_proj"),
    ({"targets": "q_porj"}, "target 'q_porj' matches no projection of the model; nearest: .*q_proj"),
    ({"targets": ["norm"]}, "target 'norm' matches .*norm, a LayerNorm, which is no projection; nearest: "),
    ({"targets": ["q_proj", "norm"]}, "target 'norm' matches .*norm, a LayerNorm, which is no projection; nearest: "),
    ({"targets": ".*(norm|q_proj)"}, "matches .*norm, a LayerNorm, which is no projection; nearest: "),
    ({"targets": ["layers"]}, "target 'layers' matches no projection|matches .*layers, a .*, which is no projection"),
    ({"targets": "*.q_proj"}, r"'\*\.q_proj' is read as a regular expression, and is not a valid one"),
    ({"targets": ["q_proj"], "exclude": "*.0.*"}, r"'\*\.0\.\*' is read as a regular expression"),
    (
        {"targets": ["q_proj"], "rank_pattern": {"(": 2}},
        r"rank_pattern has the key '\(', which is no regular expression",
    ),
    ({"targets": ["q_proj"], "exclude": ["v_porj"]}, "exclude 'v_porj' matches nothing; nearest: .*v_proj"),
    ({"targets": ["q_proj"], "exclude": "v_porj"}, "exclude 'v_porj' matches nothing; nearest: .*v_proj"),
    ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "matches no projection .* not left out again by exclude="),
    ({"targets": ["q_proj"], "layers": [7]}, r"layers=\[7\]: the targets stand in layers \[0, 1, 2\], not in \[7\]"),
    ({"targets": ["q_proj"], "layers": [0, 3]}, r"layers=\[0, 3\]: .* not in \[3\]"),
    ({"targets": "all-linear", "layers": [5]}, r"layers=\[5\]: .* not in \[5\]"),
    ({"targets": ["lm_head"], "layers": [0]}, r"layers=\[0\]: the targets stand in layers \[\], not in \[0\]"),
    (
        {"targets": ["q_proj"], "rank_pattern": {"v_proj": 2}},
        "key 'v_proj' of rank_pattern or alpha_pattern .*nearest: ",
    ),
    ({"targets": ["q_proj"], "alpha_pattern": {"q_pro": 2}}, "key 'q_pro' of .*nearest: .*q_proj"),
    ({"targets": ["q_proj"], "layers": [0], "rank_pattern": {"layers.1.*": 2}}, "key 'layers.1.*' of"),
    (
        {"targets": ["q_proj"], "modules_to_save": ["score"]},
        "modules_to_save entry 'score' matches no module; nearest: ",
    ),
    ({"targets": ["lm_head"], "modules_to_save": ["lm_head"]}, "'lm_head' is in modules_to_save already"),
]


@pytest.mark.parametrize("selection, message", WRONG, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_a_wrong_selection_is_an_error(model, selection, message):
    with pytest.raises(ValueError, match=message):
        subjects.adapted_names(model, **selection)


def test_only_some_layers_of_a_stack_cannot_be_saved():
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.norm' matches only some layers of the stack layers/norm"):
        subjects.adapted_names(Stacked(nnx.Rngs(0)), targets=["q_proj"], modules_to_save=["model.layers.1.norm"])


WRONG_FIELDS = [
    ({"targets": []}, ValueError, "targets is empty"),
    ({"targets": [""]}, TypeError, "targets takes module names, got ''"),
    ({"targets": [3]}, TypeError, "targets takes module names, got 3"),
    ({"targets": 3}, TypeError, "targets takes module names, got 3"),
    ({"targets": True}, TypeError, "targets takes module names, got True"),
    ({"targets": ["a"], "exclude": [None]}, TypeError, "exclude takes module names, got None"),
    ({"targets": ["a"], "modules_to_save": 1}, TypeError, "modules_to_save takes module names, got 1"),
    ({"targets": ".*a", "layers": [1]}, ValueError, "with a regular expression, say the layers in it"),
    ({"targets": ["a"], "layers": []}, ValueError, r"layers takes the indices of layers, counted from 0, got \[\]"),
    ({"targets": ["a"], "layers": [-1]}, ValueError, r"counted from 0, got \[-1\]"),
    ({"targets": ["a"], "layers": ["1"]}, ValueError, r"counted from 0, got \['1'\]"),
    ({"targets": ["a"], "layers": True}, ValueError, "counted from 0, got True"),
    ({"targets": ["a"], "layers": 1.0}, ValueError, "counted from 0, got 1.0"),
]


@pytest.mark.parametrize("fields, error, message", WRONG_FIELDS, ids=lambda v: str(v) if isinstance(v, dict) else "")
@pytest.mark.untyped
def test_a_wrong_field_is_an_error(fields, error, message):
    with pytest.raises(error, match=message):
        jpeft.LoRA(**fields)


def test_the_head_of_a_classification_task_is_trained_unless_told_not_to():
    def saved(**options):
        adapted = jpeft.adapt(model, jpeft.LoRA(rank=1, targets=["q_proj"], **options), key=KEY)
        return {path.split("/adapters/")[0] for path in jpeft.partition(adapted)[1] if "/saved/" in path}

    model = Stacked(nnx.Rngs(0))
    model.task = "CAUSAL_LM"
    assert saved() == set()
    for model.task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        assert saved() == {"lm_head"}
        assert saved(modules_to_save=()) == set()
        assert saved(modules_to_save=["embed_tokens"]) == {"embed_tokens", "lm_head"}  # peft adds the head too
        assert saved(modules_to_save="lm_head") == {"lm_head"}


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "loha", "lokr", "vera", "oft", "fourierft", "ia3"])
def test_layers_beside_a_regular_expression_are_refused(kind):
    """They would pick nothing: the expression says itself which layers it means."""
    needed = {"total_steps": 10} if kind == "adalora" else {}
    method: Any = jpeft.METHODS[kind]
    with pytest.raises(ValueError, match="with a regular expression, say the layers in it"):
        method(targets=".*up", layers=[0], **needed)
