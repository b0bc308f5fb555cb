# SPDX-License-Identifier: Apache-2.0
"""The Llama family against transformers: every config attribute, logits and gradients; and a real pretrained model."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from jpeft import models
from jpeft._stack import REMAT_POLICIES
from jpeft.models import llama

#: float32 sums of some hundred terms of unit size, in two orders of summation.
ATOL = 1e-5
#: Share of the logits' norm: bfloat16 keeps 8 bits, 2^-8 per rounding, over some thirty roundings in a row.
BF16_SHARE = 0.03
SEQ = 13

TINY = {
    "model_type": "llama", "vocab_size": 59, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MISTRAL = TINY | {"model_type": "mistral"}
QWEN2 = TINY | {"model_type": "qwen2"}
QWEN3 = TINY | {"model_type": "qwen3", "head_dim": 8}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4}


def rope(kind, theta=10000.0, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

#: Every attribute that changes what a model computes, varied.
CONFIGS = {
    "llama": TINY,
    "own key heads": TINY | {"num_key_value_heads": 4},
    "one key head": TINY | {"num_key_value_heads": 1, "num_hidden_layers": 2},
    "attention_bias": TINY | {"attention_bias": True},
    "mlp_bias": TINY | {"mlp_bias": True},
    "head_dim": TINY | {"head_dim": 10},
    "tied": TINY | {"tie_word_embeddings": True},
    "rms_norm_eps": TINY | {"rms_norm_eps": 0.5},
    "gelu": TINY | {"hidden_act": "gelu"},
    "gelu_pytorch_tanh": TINY | {"hidden_act": "gelu_pytorch_tanh"},
    "relu": TINY | {"hidden_act": "relu"},
    "rope_theta": TINY | rope("default", theta=50.0),
    "rope linear": TINY | rope("linear", factor=3.0),
    "rope dynamic": TINY | rope("dynamic", factor=2.0) | {"max_position_embeddings": 8},
    "rope dynamic, short": TINY | rope("dynamic", factor=2.0),
    "rope llama3": TINY | rope("llama3", **LLAMA3),
    "rope yarn": TINY | rope("yarn", **YARN),
    "rope yarn, betas": TINY | rope("yarn", theta=100.0, beta_fast=2.0, beta_slow=0.5, truncate=False, **YARN),
    "rope yarn, factor": TINY | rope("yarn", attention_factor=1.3, **YARN),
    "rope yarn, mscale": TINY | rope("yarn", mscale=0.7, mscale_all_dim=0.4, **YARN),
    "mistral": MISTRAL | {"sliding_window": 4},
    "mistral, no window": MISTRAL | {"sliding_window": None, "head_dim": 10},
    "qwen2": QWEN2,
    "qwen2, windows": QWEN2 | WINDOWED | {"max_window_layers": 1},
    "qwen2, all windows": QWEN2 | WINDOWED | {"max_window_layers": 0, "tie_word_embeddings": True},
    "qwen2, layer_types": QWEN2 | WINDOWED
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen3": QWEN3,
    "qwen3, bias": QWEN3 | {"attention_bias": True, "rms_norm_eps": 0.1},
    "qwen3, windows": QWEN3 | WINDOWED | {"max_window_layers": 2, "tie_word_embeddings": True},
}  # fmt: skip
AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
HEADS = {f"{base['model_type']}, {task}": (base, task) for base in (TINY, MISTRAL, QWEN2, QWEN3) for task in AUTO}


def torch_model(config, task="CAUSAL_LM", seed=0):
    """A transformers model whose every weight is random, norms and biases too."""
    torch.manual_seed(seed)
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    kind = transformers.AutoConfig.for_model(**config, num_labels=5 if task != "QUESTION_ANS" else 2)
    model = AUTO[task].from_config(kind, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def batch(seed=0):
    """Three rows: whole, padded right, padded left."""
    rng = np.random.default_rng(seed)
    mask = np.ones((3, SEQ), int)
    mask[1, 8:] = 0
    mask[2, :4] = 0
    return np.where(mask, rng.integers(3, TINY["vocab_size"], (3, SEQ)), TINY["pad_token_id"]), mask


def build(config=TINY, task="CAUSAL_LM", **options):
    """A model of ours whose every weight is random."""
    model = models.build(config, task, key=jax.random.key(0), **options)
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    noisy = [(leaf + n).astype(leaf.dtype) for leaf, n in zip(leaves, noise, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, noisy))


def torch_output(model, task, mask, **inputs):
    out = model(attention_mask=torch.tensor(mask), use_cache=False, **inputs)
    if task == "QUESTION_ANS":
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.last_hidden_state if task == "FEATURE_EXTRACTION" else out.logits


def flat(model):
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(graphdef, state, inputs, weights):
    """The logits, and the gradients of their sum under `weights` with respect to the leaves and float inputs."""
    embeds = inputs.pop("inputs_embeds", None)

    def loss(state, embeds):
        logits = nnx.merge(graphdef, state)(**inputs, inputs_embeds=embeds)
        return jnp.sum(logits * weights), logits

    (_, logits), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, embeds)
    return logits, gradients


def run(model, weights, **inputs):
    logits, (leaves, embeds) = loss_and_gradients(*nnx.split(model), inputs, weights)
    return logits, flat(nnx.merge(nnx.graphdef(model), leaves)), embeds


def assert_close(found, expected, path=""):
    """Within ATOL at unit scale: of the largest entry where that is above 1."""
    np.testing.assert_allclose(found, expected, atol=ATOL * max(1.0, np.abs(expected).max()), rtol=0, err_msg=path)


# Against transformers -------------------------------------------------------------------------------------------------


def check(config, task, folder):
    """Logits and gradients of every leaf and of inputs_embeds are those of transformers, where tokens are real."""
    theirs = torch_model(config, task)
    theirs.save_pretrained(folder / "model")
    ours = models.load(folder / "model")
    assert ours.task == task
    ids, mask = batch()
    real = np.ones(3, bool) if task == "SEQ_CLS" else mask.astype(bool)

    expected = torch_output(theirs, task, mask, input_ids=torch.tensor(ids))
    weights = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32) / expected[0].numel() ** 0.5
    weights *= real.reshape(real.shape + (1,) * (weights.ndim - real.ndim))
    (expected * torch.tensor(weights)).sum().backward()
    theirs.save_pretrained(folder / "gradients", state_dict={n: p.grad for n, p in theirs.named_parameters()})

    logits, gradients, _ = run(ours, weights, input_ids=ids, attention_mask=mask)
    assert logits.dtype == jnp.float32
    assert_close(np.asarray(logits)[real], expected.detach().numpy()[real])
    for path, gradient in flat(models.load(folder / "gradients")).items():
        assert_close(gradients[path], gradient, path)

    embeds = theirs.get_input_embeddings().weight.detach()[torch.tensor(ids)].requires_grad_()
    if task == "SEQ_CLS":
        return  # transformers pools inputs_embeds by their last position, be it padding or not
    (torch_output(theirs, task, mask, inputs_embeds=embeds) * torch.tensor(weights)).sum().backward()
    _, _, found = run(ours, weights, inputs_embeds=embeds.detach().numpy(), attention_mask=mask)
    assert_close(found, embeds.grad.numpy(), "inputs_embeds")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_transformers(name, tmp_path):
    check(CONFIGS[name], "CAUSAL_LM", tmp_path)


@pytest.mark.parametrize("name", [name for name in HEADS if "CAUSAL" not in name])
def test_the_heads_are_transformers(name, tmp_path):
    config, task = HEADS[name]
    check(config, task, tmp_path)


def test_positions_are_transformers(tmp_path):
    theirs = torch_model(TINY)
    theirs.save_pretrained(tmp_path)
    ids, _ = batch()
    positions = np.random.default_rng(0).integers(0, 40, (3, SEQ))
    expected = theirs(torch.tensor(ids), position_ids=torch.tensor(positions)).logits.detach().numpy()
    assert_close(models.load(tmp_path)(ids, positions=positions), expected)


def test_without_a_padding_token_the_last_token_decides(tmp_path):
    theirs = torch_model(TINY | {"pad_token_id": None}, "SEQ_CLS")
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    ids, mask = batch()
    expected = theirs(torch.tensor(ids[:1])).logits.detach().numpy()
    assert_close(ours(ids[:1]), expected)
    shorter = theirs(torch.tensor(ids[1:2, :8])).logits.detach().numpy()
    assert_close(ours(ids, mask)[1:2], shorter)


@pytest.mark.parametrize("name", ["llama", "qwen2, windows", "qwen3", "rope yarn"])
def test_bfloat16_stays_near_float32(name, tmp_path):
    theirs = torch_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ids, mask = batch()
    expected = torch_output(theirs, "CAUSAL_LM", mask, input_ids=torch.tensor(ids)).detach().numpy()[mask == 1]
    ours = models.load(tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in flat(ours).values()} == {jnp.dtype(jnp.bfloat16)}
    logits = ours(ids, mask)
    assert logits.dtype == jnp.float32
    error = np.asarray(logits)[mask == 1] - expected
    assert np.linalg.norm(error) < BF16_SHARE * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2, layer_types", "qwen3, windows", "rope llama3", "mlp_bias"]
)
@pytest.mark.parametrize("task", AUTO)
def test_transformers_loads_what_is_saved(name, task, tmp_path):
    ours = build(CONFIGS[name], task)
    models.save(ours, tmp_path)
    theirs, info = AUTO[task].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    ids, mask = batch()
    expected = torch_output(theirs.eval(), task, mask, input_ids=torch.tensor(ids)).detach().numpy()
    real = np.ones(3, bool) if task == "SEQ_CLS" else mask.astype(bool)
    assert_close(np.asarray(ours(ids, mask))[real], expected[real])
    again = models.load(tmp_path)
    assert again.config == ours.config
    for path, leaf in flat(again).items():
        np.testing.assert_array_equal(leaf, flat(ours)[path])


# A real model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(name="stories")
def _stories(data):
    return data / "models" / "stories260K"


def test_stories260k_gives_its_logits(stories):
    fixture = np.load(stories / "fixture_logits.npz")
    logits = models.load(stories)(fixture["input_ids"])
    np.testing.assert_allclose(logits, fixture["logits"], atol=1e-4, rtol=0)  # logits reach 20


def test_stories260k_tells_its_story(stories):
    model = models.load(stories)
    expected = json.loads((stories / "expected.json").read_text())
    story = expected["greedy_ids"]
    tokens = np.zeros((1, len(story)), int)
    tokens[0, : len(expected["prompt_ids"])] = expected["prompt_ids"]
    graphdef, state = nnx.split(model)

    @jax.jit
    def following(tokens, length):
        return nnx.merge(graphdef, state)(tokens)[0, length - 1].argmax()

    for length in range(len(expected["prompt_ids"]), len(story)):
        tokens[0, length] = following(tokens, length)
    assert tokens[0].tolist() == story


# What every model keeps -----------------------------------------------------------------------------------------------

KINDS = ["llama", "mistral", "qwen2, windows", "qwen3", "tied"]


@pytest.mark.parametrize("name", KINDS)
def test_a_token_sees_no_later_one(name):
    model = build(CONFIGS[name])
    ids, _ = batch()
    later = ids.copy()
    later[:, 7:] = (later[:, 7:] + 5) % TINY["vocab_size"]
    np.testing.assert_array_equal(model(ids)[:, :7], model(later)[:, :7])
    embeds = np.random.default_rng(0).standard_normal((1, SEQ, TINY["hidden_size"])).astype(np.float32)
    seen = jax.jacobian(lambda e: model(inputs_embeds=e)[0, 6, 3])(embeds)[0]
    assert not np.any(seen[7:])
    assert np.all(np.any(seen[4:7], axis=-1))


@pytest.mark.parametrize("name", KINDS)
def test_a_row_does_not_depend_on_the_others(name):
    model = build(CONFIGS[name])
    ids, mask = batch()
    other, other_mask = ids.copy(), mask.copy()
    other[1:], other_mask[1:] = ids[[0, 0]] + 1, 1
    np.testing.assert_array_equal(model(ids, mask)[0], model(other, other_mask)[0])


@pytest.mark.parametrize("name", [*KINDS, "rope llama3"])
def test_packed_segments_are_separate_runs(name):
    model = build(CONFIGS[name])
    ids, _ = batch()
    segments = np.array([[1] * 5 + [2] * 8, [3] * 1 + [1] * 12, [1] * 13])
    packed = np.asarray(model(ids, segment_ids=segments))
    for row, length in ((0, 5), (1, 1), (2, 13)):
        assert_close(packed[row, :length], model(ids[row : row + 1, :length])[0])
        if length < SEQ:
            assert_close(packed[row, length:], model(ids[row : row + 1, length:])[0])


@pytest.mark.parametrize("name", ["llama", "qwen2, windows"])
def test_a_scan_is_the_unrolled_loop(name):
    scanned, unrolled = build(CONFIGS[name]), build(CONFIGS[name], unroll=True)
    ids, mask = batch()
    weights = np.random.default_rng(0).standard_normal((3, SEQ, TINY["vocab_size"])).astype(np.float32)
    logits, gradients, _ = run(scanned, weights, input_ids=ids, attention_mask=mask)
    same, same_gradients, _ = run(unrolled, weights, input_ids=ids, attention_mask=mask)
    assert_close(logits, same)
    for path, gradient in gradients.items():
        assert_close(gradient, same_gradients[path], path)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_remat_changes_nothing(remat):
    ids, mask = batch()
    weights = np.random.default_rng(0).standard_normal((3, SEQ, TINY["vocab_size"])).astype(np.float32)
    config = CONFIGS["qwen2, windows"]
    logits, gradients, _ = run(build(config), weights, input_ids=ids, attention_mask=mask)
    same, same_gradients, _ = run(build(config, remat=remat), weights, input_ids=ids, attention_mask=mask)
    assert_close(logits, same)
    for path, gradient in gradients.items():
        assert_close(gradient, same_gradients[path], path)


@pytest.mark.parametrize(("remat", "fewer"), [("full", "names"), ("names", "dots"), ("dots", "none")])
def test_remat_keeps_less(remat, fewer):
    """The bytes that the backward pass of the compiled step is handed, from policy to policy."""

    def kept(policy):
        graphdef, state = nnx.split(build(remat=policy))
        forward = jax.jit(lambda state, ids: jax.vjp(lambda s: nnx.merge(graphdef, s)(ids), state)[1])
        residuals = jax.tree.leaves(jax.eval_shape(forward, state, batch()[0]))
        return sum(leaf.size for leaf in residuals)

    assert kept(remat) < kept(fewer)


def test_dropout_acts_with_a_key_alone():
    model = build(TINY | {"attention_dropout": 0.5})
    ids, mask = batch()
    calm = model(ids, mask)
    np.testing.assert_array_equal(calm, build(TINY)(ids, mask))
    first, again = (model(ids, mask, key=jax.random.key(0)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - calm).max() > 0.1
    assert np.abs(first - model(ids, mask, key=jax.random.key(1))).max() > 0.1


def test_every_module_has_its_transformers_name():
    model = build(QWEN3)
    theirs = {name for name, _ in torch_model(QWEN3).named_modules()}
    found = model.module_names()
    assert found["layers/self_attn/q_proj"] == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))
    assert {name for names in found.values() for name in names} <= theirs
    owners = {path.rpartition("/")[0] for path in flat(model)}
    assert owners <= set(found)


# Config ---------------------------------------------------------------------------------------------------------------

#: field -> (what stands beside it, its other value, the task in which it shows)
PERTURBED = {
    "vocab_size": ({}, 60, "CAUSAL_LM"),
    "hidden_size": ({}, 32, "CAUSAL_LM"),
    "intermediate_size": ({}, 38, "CAUSAL_LM"),
    "num_hidden_layers": ({}, 2, "CAUSAL_LM"),
    "num_attention_heads": ({}, 2, "CAUSAL_LM"),
    "num_key_value_heads": ({}, 4, "CAUSAL_LM"),
    "head_dim": ({}, 10, "CAUSAL_LM"),
    "hidden_act": ({}, "relu", "CAUSAL_LM"),
    "max_position_embeddings": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 9, "CAUSAL_LM"),
    "initializer_range": ({}, 0.3, "CAUSAL_LM"),
    "rms_norm_eps": ({}, 1e-3, "CAUSAL_LM"),
    "tie_word_embeddings": ({}, True, "CAUSAL_LM"),
    "rope_theta": ({}, 20.0, "CAUSAL_LM"),
    "rope_scaling": ({}, {"rope_type": "linear", "factor": 2.0}, "CAUSAL_LM"),
    "attention_bias": ({}, True, "CAUSAL_LM"),
    "mlp_bias": ({}, True, "CAUSAL_LM"),
    "attention_dropout": ({}, 0.1, "CAUSAL_LM"),
    "use_sliding_window": ({"model_type": "qwen2", "sliding_window": 3, "max_window_layers": 1}, True, "CAUSAL_LM"),
    "sliding_window": ({"model_type": "mistral", "sliding_window": 3}, 4, "CAUSAL_LM"),
    "max_window_layers": ({"model_type": "qwen2", **WINDOWED, "max_window_layers": 1}, 2, "CAUSAL_LM"),
    "layer_types": ({"model_type": "qwen2", **WINDOWED}, ("full_attention",) * 2 + ("sliding_attention",), "CAUSAL_LM"),
    "classifier_dropout": ({}, 0.4, "TOKEN_CLS"),
    "token_classification_bias": ({}, False, "TOKEN_CLS"),
    "pad_token_id": ({}, 3, "CAUSAL_LM"),
    "num_labels": ({}, 3, "SEQ_CLS"),
    "model_type": ({}, "qwen2", "CAUSAL_LM"),
}


def program(config, task):
    """What a model computes, as text and constants: from its key through its first values to logits."""

    def run(key, ids):
        return llama.Llama(config, task, rngs=nnx.Rngs(key))(ids, key=key)

    closed = jax.make_jaxpr(run)(jax.random.key(0), jnp.zeros((2, 11), jnp.int32))
    return str(closed), [np.asarray(c).tolist() for c in closed.consts if not isinstance(c, jax.Array) or c.size < 1e5]


def test_every_field_is_perturbed():
    assert set(PERTURBED) == {field.name for field in dataclasses.fields(llama.Config)} - {"hf"}


@pytest.mark.parametrize("field", PERTURBED)
def test_no_field_is_dead(field):
    beside, value, task = PERTURBED[field]
    names = {f.name for f in dataclasses.fields(llama.Config)}
    base = llama.Config(**{name: v for name, v in (TINY | beside).items() if name in names})
    assert program(base, task) != program(dataclasses.replace(base, **{field: value}), task)


def meaning(config):
    """A config with what it says of head size and windows in place of how it says it."""
    how = {"head_dim": config.d_head, "layer_types": None, "use_sliding_window": False, "sliding_window": None}
    return dataclasses.replace(config, **how, max_window_layers=28), config.windows


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_the_way_there_and_back(name):
    config = llama.Config.from_hf(CONFIGS[name])
    written = json.loads(json.dumps(config.to_hf()))
    assert llama.Config.from_hf(written) == config
    theirs = transformers.AutoConfig.for_model(**written).to_json_string(use_diff=False)
    assert meaning(llama.Config.from_hf(json.loads(theirs))) == meaning(config)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_defaults_are_transformers(model_type):
    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    assert meaning(llama.Config.from_hf({"model_type": model_type})) == meaning(llama.Config.from_hf(theirs))


@pytest.mark.parametrize("name", ["rope_theta", "rope linear", "rope llama3", "rope yarn, betas"])
def test_both_layouts_of_rope_are_read(name):
    new = CONFIGS[name]
    scaling = dict(new["rope_parameters"])
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    assert llama.Config.from_hf(old) == llama.Config.from_hf(new)
    scaling["type"] = scaling.pop("rope_type")
    assert llama.Config.from_hf(old) == llama.Config.from_hf(new)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_sinks": 4}, "not supported: attention_sinks"),
        ({"model_type": "gemma"}, "model_type must be one of llama, mistral, qwen2, qwen3; got 'gemma'"),
        ({"hidden_size": 25}, "hidden_size must be a multiple of num_attention_heads; got 25 and 4"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads; got 4 and 3"),
        ({"head_dim": 7}, "even head size; got head_dim=7"),
        ({"hidden_act": "xielu"}, "hidden_act must be one of .*; got 'xielu'"),
        ({"sliding_window": 8}, "a llama model has no sliding_window=8; transformers would ignore it"),
        ({"model_type": "qwen2", "attention_bias": True}, "a qwen2 model has no attention_bias=True"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "for each of 3 layers; got .'full_attention',."),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3},
            "needs use_sliding_window and a sliding_window; got use_sliding_window=False",
        ),
        (rope("longrope", factor=2.0), "rope_type must be one of default, linear, .*; got 'longrope'"),
        (rope("linear"), "missing: .'factor'., unknown: .."),
        (rope("linear", factor=2.0, partial_rotary_factor=0.5), "unknown: .'partial_rotary_factor'."),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        llama.Config.from_hf(TINY | changes)


#: Parameters as the checkpoints' pages give them.
SIZES = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-1.5b": 1_543_714_304,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "qwen3-0.6b": 596_049_920,
}


def test_presets_have_the_sizes_of_their_checkpoints():
    assert {name: models.num_parameters(config, "CAUSAL_LM") for name, config in llama.PRESETS.items()} == SIZES


# Errors ---------------------------------------------------------------------------------------------------------------


def test_wrong_calls_are_refused():
    model = build()
    ids, _ = batch()
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=np.zeros((3, SEQ, 24), np.float32))
    with pytest.raises(ValueError, match="a llama model has no token types"):
        model(ids, token_type_ids=np.zeros_like(ids))
    with pytest.raises(ValueError, match="SEQ_CLS gives one output per row"):
        build(task="SEQ_CLS")(ids, segment_ids=np.ones_like(ids))
