# SPDX-License-Identifier: Apache-2.0
"""BERT against transformers: logits, gradients, the real all-MiniLM-L6-v2; and what every model of the zoo keeps."""

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
from jpeft.models import bert

#: float32 sums of some hundred terms of unit size, in two orders of summation.
ATOL = 1e-5
#: bfloat16 keeps 8 bits: 2^-8 per rounding, over some twenty roundings in a row.
BF16_ATOL = 0.08

TINY = {
    "model_type": "bert", "vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 37, "max_position_embeddings": 19, "type_vocab_size": 3, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "gelu": TINY,
    "gelu_new": TINY | {"hidden_act": "gelu_new", "num_attention_heads": 1, "layer_norm_eps": 1e-2},
    "relu": TINY | {"hidden_act": "relu", "type_vocab_size": 1, "pad_token_id": 7, "num_hidden_layers": 2},
    "silu": TINY | {"hidden_act": "silu", "hidden_size": 10, "num_attention_heads": 5, "pad_token_id": None},
}
CLASSES = {
    "SEQ_CLS": transformers.BertForSequenceClassification,
    "TOKEN_CLS": transformers.BertForTokenClassification,
    "QUESTION_ANS": transformers.BertForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.BertModel,
}
SEQ = 13
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def torch_model(config, task, num_labels=2, seed=0):
    """A transformers model whose every weight is random, norms and biases too."""
    torch.manual_seed(seed)
    hf = transformers.BertConfig(**(config | {"num_labels": num_labels}))
    model = CLASSES[task](hf)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("LayerNorm.weight", "bias")):
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def batch(config, seed=0):
    """Three rows: whole, padded right, padded left."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config["vocab_size"], (3, SEQ))
    mask = np.ones((3, SEQ), int)
    mask[1, 8:] = 0
    mask[2, :4] = 0
    ids = np.where(mask, ids, config.get("pad_token_id") or 0)
    types = rng.integers(0, config.get("type_vocab_size", 2), (3, SEQ))
    return ids, mask, types


def build(task="SEQ_CLS", config=TINY, seed=0, **options):
    """A model of ours whose every weight is random, two layers deep."""
    model = models.build(config | {"num_hidden_layers": 2}, task, key=jax.random.key(seed), **options)
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        (leaf + 0.3 * jax.random.normal(k, leaf.shape)).astype(leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, noisy))


def run(model, *args, **kwargs):
    """`model(*args, **kwargs)`, compiled."""
    return _run(*nnx.split(model), args, kwargs)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, args, kwargs):
    return nnx.merge(graphdef, state)(*args, **kwargs)


def torch_logits(model, task, ids, mask, types):
    out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), token_type_ids=torch.tensor(types))
    if task == "QUESTION_ANS":
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.last_hidden_state if task == "FEATURE_EXTRACTION" else out.logits


def flat(model):
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


# Against transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_transformers(name, task, tmp_path):
    config = CONFIGS[name]
    theirs = torch_model(config, task, num_labels=5 if task != "QUESTION_ANS" else 2)
    theirs.save_pretrained(tmp_path / "model")
    ours = models.load(tmp_path / "model")
    assert ours.task == task
    ids, mask, types = batch(config)

    expected = torch_logits(theirs, task, ids, mask, types)
    np.testing.assert_allclose(run(ours, ids, mask, types), expected.detach().numpy(), atol=ATOL, rtol=0)

    weights = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32) / expected.numel() ** 0.5
    (expected * torch.tensor(weights)).sum().backward()
    used = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in theirs.named_parameters()}
    theirs.save_pretrained(tmp_path / "gradients", state_dict=used)
    expected_gradients = flat(models.load(tmp_path / "gradients"))

    graphdef, state = nnx.split(ours)

    def loss(state):
        return jnp.sum(nnx.merge(graphdef, state)(ids, mask, types) * weights)

    gradients = jax.jit(jax.grad(loss))(state)
    for path, gradient in flat(nnx.merge(graphdef, gradients)).items():
        np.testing.assert_allclose(gradient, expected_gradients[path], atol=ATOL, rtol=ATOL, err_msg=path)


def test_inputs_embeds_positions_and_defaults_are_transformers(tmp_path):
    theirs = torch_model(TINY, "FEATURE_EXTRACTION")
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((2, SEQ, TINY["hidden_size"])).astype(np.float32)
    positions = rng.integers(0, TINY["max_position_embeddings"], (2, SEQ))
    out = theirs(inputs_embeds=torch.tensor(embeds), position_ids=torch.tensor(positions))
    hidden = ours.hidden(inputs_embeds=embeds, positions=positions)
    np.testing.assert_allclose(hidden, out.last_hidden_state.detach().numpy(), atol=ATOL, rtol=0)
    np.testing.assert_allclose(ours.pooled(hidden), out.pooler_output.detach().numpy(), atol=ATOL, rtol=0)


def test_minilm_gives_torchs_sentence_embeddings(minilm):
    theirs = transformers.AutoModel.from_pretrained(minilm).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    sentences = ["The cat sat on the mat.", "Adapters are small; the base stays frozen, and can be shared.", "Yes"]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    hidden = run(models.load(minilm), *(tokens[name].numpy() for name in INPUTS))
    with torch.no_grad():
        expected = theirs(**tokens).last_hidden_state.numpy()
    seen = tokens["attention_mask"].numpy().astype(bool)  # torch's own rounding error at the padding is 8e-5
    np.testing.assert_allclose(hidden[seen], expected[seen], atol=ATOL, rtol=0)
    np.testing.assert_allclose(_embeddings(hidden, seen), _embeddings(expected, seen), atol=ATOL, rtol=0)


def _embeddings(states, seen):
    """The mean over the tokens, at unit length."""
    means = (states * seen[..., None]).sum(1) / seen.sum(1, keepdims=True)
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


@pytest.mark.parametrize("task", CLASSES)
def test_transformers_loads_what_we_save_and_we_load_it_back(task, tmp_path):
    ours = build(task, TINY | {"hidden_act": "relu"})
    models.save(ours, tmp_path)
    theirs, info = CLASSES[task].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids, mask, types = batch(TINY)
    expected = torch_logits(theirs.eval(), task, ids, mask, types).detach().numpy()
    np.testing.assert_allclose(run(ours, ids, mask, types), expected, atol=ATOL, rtol=0)
    again = models.load(tmp_path)
    assert (again.config, again.task) == (ours.config, task)
    jax.tree.map(np.testing.assert_array_equal, flat(again), flat(ours))


def test_parameter_counts_of_the_presets():
    counts = {name: models.num_parameters(config) for name, config in bert.PRESETS.items()}
    assert counts == {
        "bert-base-uncased": 109_482_240,
        "bert-large-uncased": 335_141_888,
        "all-MiniLM-L6-v2": 22_713_216,
        "roberta-base": 124_645_632,
        "roberta-large": 355_359_744,
        "xlm-roberta-base": 278_043_648,
        "xlm-roberta-large": 559_890_432,
    }


# What every model of the zoo keeps -----------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_the_others():
    model = build()
    ids, mask, types = batch(TINY)
    changed = ids.copy()
    changed[1:] = (changed[1:] + 5) % TINY["vocab_size"]
    np.testing.assert_array_equal(run(model, ids, mask, types)[0], run(model, changed, mask, types)[0])


def test_padding_is_not_seen():
    model = build("TOKEN_CLS")
    ids, mask, types = batch(TINY)
    changed = np.where(mask, ids, 11)
    seen = mask.astype(bool)
    np.testing.assert_array_equal(run(model, ids, mask, types)[seen], run(model, changed, mask, types)[seen])


def test_packed_segments_equal_separate_rows():
    model = build("TOKEN_CLS")
    ids, _, types = batch(TINY)
    segments = np.array([[1] * 5 + [2] * 3 + [3] * 5] * 3)
    packed = run(model, ids, token_type_ids=types, segment_ids=segments)
    for segment in (1, 2, 3):
        here = segments[0] == segment
        alone = run(model, ids[:, here], token_type_ids=types[:, here])
        np.testing.assert_allclose(packed[:, here], alone, atol=ATOL, rtol=0)


def _loss_and_gradients(model, key=None):
    graphdef, state = nnx.split(model)
    ids, mask, types = batch(TINY)

    def loss(state):
        return (
            jnp.sum(jnp.square(nnx.merge(graphdef, state)(ids, mask, types, key=key))) / 100
        )  # gradients of unit size

    value, gradients = jax.jit(jax.value_and_grad(loss))(state)
    return value, nnx.to_pure_dict(gradients)


@pytest.mark.parametrize(
    "options", [{"unroll": True}] + [{"remat": policy} for policy in ("dots", "full", "names", "offload")], ids=str
)
def test_unrolling_and_remat_change_no_number(options):
    key = jax.random.key(5)
    expected = _loss_and_gradients(build(), key)
    actual = _loss_and_gradients(build(**options), key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL, rtol=ATOL), actual, expected)


def test_dropout_follows_its_key():
    ids, mask, types = batch(TINY)
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    model = build(config=TINY | rates)
    keys = jax.random.split(jax.random.key(0), 2)
    one, other = (run(model, ids, mask, types, key=key) for key in keys)
    np.testing.assert_array_equal(one, run(model, ids, mask, types, key=keys[0]))
    assert np.abs(one - other).max() > 0.1
    deterministic = build(config=TINY | dict.fromkeys(rates, 0.0))
    np.testing.assert_array_equal(run(model, ids, mask, types), run(deterministic, ids, mask, types, key=keys[0]))


@pytest.mark.parametrize("rates", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_each_dropout_rate_is_its_own(rates):
    """Only the rate that is not zero acts, and it acts."""
    none = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.0)
    ids, mask, types = batch(TINY)
    model = build(config=TINY | none | {rates: 0.5})
    assert np.abs(run(model, ids, mask, types, key=jax.random.key(0)) - run(model, ids, mask, types)).max() > 1e-2


def test_classifier_dropout_is_unbiased():
    """The classifier is linear, so that the mean over masks is the output without dropout."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.3}
    model = build(config=TINY | none)
    ids, mask, types = batch(TINY)
    keys = jax.random.split(jax.random.key(0), 4000)
    outs = jax.jit(jax.vmap(lambda key: run(model, ids, mask, types, key=key)))(keys)
    standard_error = outs.std(0) / len(keys) ** 0.5
    assert np.all(np.abs(outs.mean(0) - run(model, ids, mask, types)) < 5 * standard_error)


def test_bfloat16_is_near_float32():
    exact = build("FEATURE_EXTRACTION", TINY | {"initializer_range": 0.02})
    graphdef, state = nnx.split(models.build(TINY, "FEATURE_EXTRACTION", key=jax.random.key(0), dtype=jnp.bfloat16))
    del state
    rough = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(exact)))
    ids, mask, types = batch(TINY)
    hidden = rough.hidden(ids, mask, types)
    assert hidden.dtype == jnp.bfloat16
    assert run(rough, ids, mask, types).dtype == jnp.float32
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact.hidden(ids, mask, types), atol=BF16_ATOL, rtol=0)


def test_building_under_eval_shape_makes_no_array():
    shapes = jax.eval_shape(lambda: nnx.state(models.build(bert.PRESETS["bert-large-uncased"], key=jax.random.key(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 335_141_888


def test_first_values_are_transformers():
    config = TINY | {"hidden_size": 240, "vocab_size": 500, "initializer_range": 0.05, "pad_token_id": 4}
    leaves = flat(models.build(config, "SEQ_CLS", key=jax.random.key(0)))
    for path, leaf in leaves.items():
        if path.endswith("bias"):
            assert not np.any(leaf), path
        elif path.endswith("scale"):
            assert np.all(leaf == 1), path
        elif leaf.size > 5000:
            assert np.std(leaf) == pytest.approx(0.05, rel=0.05), path
    assert not np.any(leaves["embeddings/word_embeddings/embedding"][4])


def test_module_names_are_transformers():
    for task, torch_class in CLASSES.items():
        ours = models.build(TINY, task, key=jax.random.key(0))
        theirs = {name for name, _ in torch_class(transformers.BertConfig(**TINY)).named_modules()}
        names = {name for found in ours.module_names().values() for name in found}
        assert names <= theirs
        owners = {"/".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(nnx.state(ours))}
        assert owners <= ours.module_names().keys()


# Config --------------------------------------------------------------------------------------------------------------

#: For each field that changes the mathematics, another value.
PERTURBED = {
    "vocab_size": 54, "hidden_size": 27, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 38,
    "hidden_act": "gelu_new", "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3,
    "classifier_dropout": 0.4, "max_position_embeddings": 20, "type_vocab_size": 4, "layer_norm_eps": 1e-3,
    "pad_token_id": 5, "num_labels": 3,
}  # fmt: skip


def _jaxpr(config):
    ids, mask, types = batch(TINY)

    def loss(state, ids, key):
        return jnp.sum(nnx.merge(graphdef, state)(ids, mask, types, key=key))

    graphdef, state = nnx.split(nnx.eval_shape(lambda: bert.Bert(config, "SEQ_CLS", rngs=nnx.Rngs(0))))
    return str(jax.make_jaxpr(jax.grad(loss))(state, ids, jax.random.key(0)))


@pytest.mark.parametrize("field", PERTURBED)
def test_every_field_changes_the_program(field):
    config = bert.Config.from_hf(TINY)
    assert _jaxpr(config) != _jaxpr(dataclasses.replace(config, **{field: PERTURBED[field]}))


def test_no_field_is_left_out():
    """initializer_range changes first values (tested above), model_type and hf nothing."""
    fields = {field.name for field in dataclasses.fields(bert.Config)}
    assert fields - PERTURBED.keys() == {"initializer_range", "model_type", "hf"}


def test_every_attribute_of_transformers_config_is_known():
    attributes = {"num_labels": 7}
    hf = transformers.BertConfig(**attributes).to_dict()
    config = bert.Config.from_hf(hf)
    assert config == dataclasses.replace(bert.Config(), num_labels=7)
    assert transformers.BertConfig.from_dict(config.to_hf()).to_dict() == hf


def test_old_configs_are_read(minilm):
    hf = json.loads((minilm / "config.json").read_text())
    assert bert.Config.from_hf(hf) == bert.PRESETS["all-MiniLM-L6-v2"]


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"rotary_value": True, "embedding_size": 3}, "embedding_size, rotary_value"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"hidden_act": "cube"}, "hidden_act must be one of .*gelu.*; got 'cube'"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads, got 24 and 5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(attributes, message):
    with pytest.raises(ValueError, match=message):
        models.build(TINY | attributes, "SEQ_CLS", key=jax.random.key(0))


def test_wrong_calls_are_refused():
    ids, mask, types = batch(TINY)
    model = build("TOKEN_CLS")
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=jnp.zeros((3, SEQ, 24)))
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(attention_mask=mask)
    with pytest.raises(ValueError, match="20 tokens are more than the 19 positions"):
        model(np.zeros((1, 20), int))
    with pytest.raises(
        ValueError, match="TOKEN_CLS of a bert model has no pooler; it has one for SEQ_CLS, MULTIPLE_CHOICE, FEAT"
    ):
        model.pooled(jnp.zeros((3, SEQ, 24)))
    with pytest.raises(ValueError, match="SEQ_CLS gives one output per row"):
        build("SEQ_CLS")(ids, mask, types, segment_ids=mask)
