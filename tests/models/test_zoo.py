# SPDX-License-Identifier: Apache-2.0
"""The zoo against transformers (every attribute, every task), and what each of its models keeps."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from llama_reference import assert_close, flat
from safetensors.numpy import load_file
from zoo_reference import (
    batch,
    build,
    by_row,
    check,
    cotangent,
    gradients_of,
    labels_of,
    outputs_of,
    seen,
    torch_model,
    torch_output,
)
from zoo_subjects import SUBJECTS

import jpeft
from jpeft import models
from jpeft.models import _families

#: Share of the outputs' norm: bfloat16 keeps 8 bits, 2^-8 per rounding, over some thirty roundings in a row.
BF16_SHARE = 0.03

VARIANTS = [(name, variant) for name, subject in SUBJECTS.items() for variant in subject.variants]
TASKS = [(name, task) for name, subject in SUBJECTS.items() for task in subject.classes]
RATES = [(name, rate) for name, subject in SUBJECTS.items() for rate in subject.rates]
FIELDS = [(name, field) for name, subject in SUBJECTS.items() for field in subject.perturbed]


#: Those made of the same modules as another one here: what is compared at length is of the slow lane.
SIBLINGS = ("xlm-roberta", "gemma3_text", "phi3")


def _lanes(cases, fast=None):
    """The cases with `fast` in them but for siblings', and the others for the slow lane: compiling takes the time."""

    def slow(name, *case):
        return name in SIBLINGS or not (fast is None or fast in case)

    return [pytest.param(*case, marks=pytest.mark.slow if slow(*case) else ()) for case in cases]


def module_of(name):
    return _families.FAMILIES[name].module


def by_token(subject):
    """A task with an output per token."""
    return next(task for task in subject.classes if not by_row(task))


# Against transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_outputs_are_transformers(name, variant, tmp_path):
    _check(name, next(iter(SUBJECTS[name].classes)), variant, tmp_path, gradients=False)


@pytest.mark.parametrize("name, task", TASKS)
def test_outputs_of_every_task_are_transformers(name, task, tmp_path):
    if task != next(iter(SUBJECTS[name].classes)):
        _check(name, task, "base", tmp_path, gradients=False)


@pytest.mark.parametrize("name, variant", _lanes(VARIANTS, "base"))
def test_gradients_are_transformers(name, variant, tmp_path):
    _check(name, next(iter(SUBJECTS[name].classes)), variant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name, task", TASKS)
def test_gradients_of_every_task_are_transformers(name, task, tmp_path):
    _check(name, task, "base", tmp_path)


def _check(name, task, variant, folder, **options):
    subject = SUBJECTS[name]
    subject = subject.changed(subject.variants[variant])
    check(torch_model(subject.config, task, subject.classes), task, batch(subject), folder, **options)


@pytest.mark.parametrize("name, task", TASKS)
def test_transformers_loads_what_we_save_and_we_load_it_back(name, task, tmp_path):
    subject = SUBJECTS[name]
    ours = build(subject.config, task)
    models.save(ours, tmp_path / "ours")
    theirs, info = subject.classes[task].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = models.load(tmp_path / folder)
        assert (again.config, again.task) == (ours.config, task)
        jax.tree.map(np.testing.assert_array_equal, flat(again), flat(ours))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_any_task_starts_from_any_checkpoint(name, tmp_path):
    subject = SUBJECTS[name]
    heads = module_of(name).HEADS
    saved, *others = subject.classes
    ours = build(subject.config, saved)
    models.save(ours, tmp_path)
    backbone = {path: leaf for path, leaf in flat(ours).items() if not path.startswith(heads)}
    for task in others:
        other = flat(models.load(tmp_path, task=task))
        assert {path for path in other if not path.startswith(heads)} == set(backbone)
        for path, leaf in backbone.items():
            np.testing.assert_array_equal(other[path], leaf)


@pytest.mark.parametrize("name", SUBJECTS)
def test_bfloat16_stays_near_float32(name, tmp_path):
    subject = SUBJECTS[name]
    task = by_token(subject)
    theirs = torch_model({**subject.config, **subject.smooth}, task, subject.classes)
    theirs.save_pretrained(tmp_path)
    inputs, real = batch(subject), seen(batch(subject), task)
    expected = torch_output(theirs, task, inputs).detach().numpy()[real]
    ours = models.load(tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in flat(ours).values()} == {jnp.dtype(jnp.bfloat16)}
    outputs = outputs_of(ours, **inputs)
    assert outputs.dtype == np.float32
    assert np.linalg.norm(outputs[real] - expected) < BF16_SHARE * np.linalg.norm(expected)


@pytest.mark.parametrize("name", SUBJECTS)
def test_module_names_are_transformers(name, tmp_path):
    subject = SUBJECTS[name]
    for task, torch_class in subject.classes.items():
        ours = build(subject.config, task)
        model = torch_class(transformers.AutoConfig.for_model(**subject.config))
        theirs = {name for name, _ in model.named_modules()}
        if subject.converted:
            model.save_pretrained(tmp_path)
            keys = (key.split(".") for key in load_file(tmp_path / "model.safetensors"))
            theirs = {".".join(key[:n]) for key in keys for n in range(1, len(key))}
        found = ours.module_names()
        assert {name for names in found.values() for name in names} <= theirs
        assert {path.rpartition("/")[0] for path in flat(ours)} <= found.keys()


# Config ---------------------------------------------------------------------------------------------------------------


@functools.cache
def _jaxpr(name, task, backward, **changes):
    subject, family = SUBJECTS[name], module_of(name)
    config = dataclasses.replace(family.Config.from_hf(subject.config), **changes)
    inputs = batch(subject if subject.reads == "input_ids" else subject.changed(changes))
    shapes = nnx.eval_shape(lambda: models.build(config, task, key=jax.random.key(0)))
    graphdef, state = nnx.split(shapes)

    def loss(state, read, key):
        return jnp.sum(nnx.merge(graphdef, state)(**inputs | {subject.reads: read}, key=key))

    closed = jax.make_jaxpr(jax.grad(loss) if backward else loss)(state, inputs[subject.reads], jax.random.key(0))
    return str(closed), [np.asarray(constant).tolist() for constant in closed.consts]


@pytest.mark.parametrize("name, field", FIELDS)
def test_every_field_changes_the_program(name, field):
    value, task, *beside = SUBJECTS[name].perturbed[field]
    others = dict(*beside)
    backward = (False, True)  # a padding token's row counts in the gradient alone, and that takes longer to trace
    assert any(_jaxpr(name, task, b, **others) != _jaxpr(name, task, b, **others | {field: value}) for b in backward)


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_field_is_left_out(name):
    subject = SUBJECTS[name]
    fields = {field.name for field in dataclasses.fields(module_of(name).Config)}
    assert fields == {*subject.perturbed, *subject.silent}


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_attribute_of_transformers_config_is_known(name):
    config = module_of(name).Config
    kind: Any = type(transformers.AutoConfig.for_model(name))
    hf = kind(num_labels=7).to_dict()
    assert config.from_hf(hf) == dataclasses.replace(config.from_hf({"model_type": name}), num_labels=7)
    assert kind.from_dict(config.from_hf(hf).to_hf()).to_dict() == hf


# What every model of the zoo keeps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_row_does_not_depend_on_the_others(name):
    subject = SUBJECTS[name]
    model = build(subject.config, by_token(subject))
    inputs = batch(subject)
    others = {
        name: np.concatenate([value[:1], _another(name, value[[0, 0]], subject)]) for name, value in inputs.items()
    }
    np.testing.assert_array_equal(outputs_of(model, **inputs)[0], outputs_of(model, **others)[0])


def _another(name, values, subject):
    """Other values of what a model reads; of the rest the same."""
    if name == subject.reads != "input_ids":
        return values + 1
    return (values + 1) % subject.vocab if name.endswith("input_ids") else values


@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.reads == "input_ids"])
def test_padding_is_not_seen(name):
    subject = SUBJECTS[name]
    task = by_token(subject)
    model, inputs = build(subject.config, task), batch(subject)
    if "roberta" in name:  # which tells padding by its token when it counts positions
        inputs["positions"] = np.maximum(np.cumsum(inputs["attention_mask"], 1) - 1, 0)
    changed = dict(inputs)
    for ids in (key for key in inputs if key.endswith("input_ids")):
        changed[ids] = np.where(inputs[ids.replace("input_ids", "attention_mask")], inputs[ids], 11)
    real = seen(inputs, task)
    np.testing.assert_array_equal(outputs_of(model, **inputs)[real], outputs_of(model, **changed)[real])


#: Those that read one text; what T5 packs on both sides is in test_t5_packed.py.
PACKED = [(name, variant) for name, variant in VARIANTS if name != "t5" and SUBJECTS[name].reads == "input_ids"]


@pytest.mark.parametrize("name, variant", _lanes(PACKED, "base"))
def test_an_example_of_a_packed_row_is_as_by_itself(name, variant):
    """Of two or three, whose numbers do not rise, with padding that is none of theirs."""
    subject = SUBJECTS[name]
    model = build({**subject.config, **subject.variants[variant]}, by_token(subject))
    ids = np.random.default_rng(3).integers(11, subject.vocab, (2, 13))
    segments = np.array([[4] * 5 + [2] * 6 + [0] * 2, [1] * 3 + [7] * 4 + [3] * 6])
    packed = outputs_of(model, input_ids=ids, attention_mask=(segments > 0).astype(int), segment_ids=segments)
    for row, number in ((0, 4), (0, 2), (1, 1), (1, 7), (1, 3)):
        own = segments[row] == number
        assert_close(packed[row, own], outputs_of(model, input_ids=ids[row : row + 1, own])[0])


def _trained(name, **options):
    subject = SUBJECTS[name]
    task = by_token(subject)
    model, inputs = build({**subject.config, **dict.fromkeys(subject.rates, 0.1)}, task, **options), batch(subject)
    shape = jax.eval_shape(lambda: model(**inputs)).shape
    return gradients_of(model, cotangent(shape, seen(inputs, task)), jax.random.key(5), **inputs)


_expected = functools.cache(_trained)
OPTIONS = [{"unroll": True}, *({"remat": policy} for policy in ("full", "dots", "names", "offload"))]
#: The fast lane has one of each family but T5, of which the contracts compare these, Whisper, and siblings.
FAST = {*SUBJECTS} - {"t5", "whisper", *SIBLINGS}
RUNS = [
    pytest.param(name, o, id=f"{name}-{o}", marks=() if o == {"remat": "full"} and name in FAST else pytest.mark.slow)
    for name in SUBJECTS
    for o in OPTIONS
]


@pytest.mark.parametrize("name, options", RUNS)
def test_unrolling_and_remat_change_no_number(name, options):
    outputs, gradients = _trained(name, **options)
    assert_close(outputs, _expected(name)[0])
    for path, gradient in _expected(name)[1].items():
        assert_close(gradients[path], gradient, path)


@functools.cache
def _calm(name, task):
    return outputs_of(build(SUBJECTS[name].config, task), **batch(SUBJECTS[name]))


@pytest.mark.parametrize("name, rate", _lanes(RATES))
def test_each_dropout_rate_is_its_own(name, rate):
    """Only the rate that is not zero acts, and it acts with a key alone."""
    subject = SUBJECTS[name]
    task, inputs = subject.rates[rate], batch(subject)
    model = build({**subject.config, rate: 0.5}, task)
    key, another = jax.random.split(jax.random.key(0))
    one, other = (outputs_of(model, k, **inputs) for k in (key, another))
    assert np.abs(one - _calm(name, task)).max() > 1e-2
    assert np.abs(one - other).max() > 1e-2
    plain = build(subject.config, task)
    without_a_rate, without_a_key = (
        jax.make_jaxpr(lambda: plain(**inputs, key=key)),
        jax.make_jaxpr(lambda: model(**inputs)),
    )
    assert str(without_a_key()) == str(without_a_rate())


@pytest.mark.parametrize("name", SUBJECTS)
def test_labels_size_the_head(name):
    subject = SUBJECTS[name]
    for task in {*_families.LABELLED} & subject.classes.keys():
        options = {"key": jax.random.key(0), "num_labels": labels_of(task)}
        shape = jax.eval_shape(
            lambda task=task, options=options: models.build(subject.config, task, **options)(**batch(subject))
        )
        assert shape.shape[-1] == labels_of(task)


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_kernel_and_table_has_a_place_on_a_mesh(name):
    """But for heads, poolers, positions, types of tokens, what is of distances, and routers, which are small."""
    config = next(preset for preset in module_of(name).PRESETS.values() if preset.model_type == name)
    model = nnx.eval_shape(lambda: models.build(config, by_token(SUBJECTS[name]), key=jax.random.key(0)))
    place = jpeft.placement(jpeft.mesh("data=2,fsdp=2,tensor=2"), uneven="whole")
    leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    whole = {path for path, leaf in leaves.items() if leaf.ndim > 1 and not any(place(path, leaf.get_value()).spec)}
    small = (
        "head",
        "classifier",
        "bias",
        "scale",
        "position_embeddings",
        "embed_positions",
        "cls_token",
        "pooler",
        "token_type",
        "wpe",
        "relative_attention_bias",
        "block_sparse_moe/gate",
        "rel_embeddings",
    )
    assert not {path for path in whole if not any(part in path for part in small)}
