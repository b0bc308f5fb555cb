# SPDX-License-Identifier: Apache-2.0
"""MULTIPLE_CHOICE of the encoders: against transformers and, with a LoRA and its head, against peft, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from llama_reference import assert_close, flat
from peft_oracle import config_of, quiet, tensors
from zoo_reference import batch, build, gradients_of, outputs_of, torch_model
from zoo_subjects import DISTILBERT, ROBERTA

import jpeft
from jpeft import models
from jpeft.train import losses

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
TASK = "MULTIPLE_CHOICE"
#: Float32 against float32, through two layers.
ATOL = 1e-5

CLASSES = {
    "bert": transformers.BertForMultipleChoice,
    "roberta": transformers.RobertaForMultipleChoice,
    "xlm-roberta": transformers.XLMRobertaForMultipleChoice,
    "distilbert": transformers.DistilBertForMultipleChoice,
}
NAMES = [pytest.param(n, marks=pytest.mark.slow if n == "xlm-roberta" else ()) for n in CLASSES]
HEADS = {"distilbert": ["pre_classifier", "classifier"]}


def config(name):
    return {**(DISTILBERT if name == "distilbert" else ROBERTA).config, "model_type": name}


def inputs(name):
    """Two questions with three choices: whole, padded right and padded left."""
    subject = DISTILBERT if name == "distilbert" else ROBERTA
    return {key: value.reshape(2, 3, -1) for key, value in _both(subject).items()}


def _both(subject):
    first, second = batch(subject), batch(subject, seed=1)
    return {key: np.concatenate([first[key], second[key]]) for key in first}


def torch_logits(model, name):
    return model(**{key: torch.tensor(value) for key, value in inputs(name).items()}).logits


def theirs(name):
    return torch_model(config(name), TASK, {TASK: CLASSES[name]})


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "bert" else pytest.mark.slow) for n in CLASSES])
def test_logits_and_gradients_are_transformers(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path / "model")
    ours = models.load(tmp_path / "model")
    assert ours.task == TASK
    logits = torch_logits(model, name)
    weights = np.cos(np.arange(6)).reshape(2, 3).astype(np.float32)
    (logits * torch.tensor(weights)).sum().backward()
    used = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "gradients", state_dict=used)
    outputs, found = gradients_of(ours, weights, **inputs(name))
    assert outputs.shape == (2, 3)
    assert_close(outputs, logits.detach().numpy())
    for path, gradient in flat(models.load(tmp_path / "gradients")).items():
        assert_close(found[path], gradient, path)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_loads_on_both_sides(name, tmp_path):
    """And gives the same logits there."""
    ours = build(config(name), TASK)
    models.save(ours, tmp_path / "ours")
    real, info = CLASSES[name].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert_close(outputs_of(ours, **inputs(name)), torch_logits(real.eval(), name).numpy())
    real.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = models.load(tmp_path / folder)
        assert (again.config, again.task) == (ours.config, TASK)
        jax.tree.map(np.testing.assert_array_equal, flat(again), flat(ours))


def test_the_loss_is_transformers(tmp_path):
    model = theirs("bert")
    model.save_pretrained(tmp_path)
    given = {key: torch.tensor(value) for key, value in inputs("bert").items()}
    expected = model(**given, labels=torch.tensor([2, 0])).loss.item()
    logits = outputs_of(models.load(tmp_path), **inputs("bert"))
    found = losses.cls_loss(lambda ids, mask: jnp.asarray(logits), {**inputs("bert"), "labels": jnp.array([2, 0])})
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert losses.SUMS[TASK] is losses.cls_sums


@pytest.mark.parametrize("name, rate", [("bert", "classifier_dropout"), ("roberta", "hidden_dropout_prob"),
                                        ("distilbert", "seq_classif_dropout")])  # fmt: skip
def test_the_head_drops(name, rate):
    """At the rate of which transformers' head reads, while a key is given."""
    model = build({**config(name), rate: 0.5}, TASK)
    hidden = jnp.ones((6, 5, 24))
    one, calm = (model.logits(hidden, key=key) for key in (jax.random.key(0), None))
    assert np.abs(one - calm).max() > 1e-2
    if name == "roberta":  # whose head for this task has the rate of all layers, whatever classifier_dropout says
        plain = build({**config(name), "classifier_dropout": 0.5}, TASK)
        np.testing.assert_array_equal(plain.logits(hidden, key=jax.random.key(0)), plain.logits(hidden))


def adapted(name, folder):
    """A saved base, and a LoRA on it of which no leaf is at its start."""
    theirs(name).save_pretrained(folder)
    targets = ["q_lin", "v_lin"] if name == "distilbert" else ["query", "value"]
    model = jpeft.adapt(models.load(folder), jpeft.LoRA(rank=3, alpha=5, targets=targets), key=jax.random.key(0))
    graphdef, trainable, frozen = jpeft.partition(model)
    rng = np.random.default_rng(0)
    noisy = {p: leaf + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32) for p, leaf in trainable.items()}
    assert any("saved" in path for path in noisy)
    return jpeft.combine(graphdef, noisy, frozen)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_peft_loads_an_adapter_with_its_head(name, tmp_path):
    ours = adapted(name, tmp_path / "base")
    jpeft.export_peft(ours, tmp_path / "adapter")
    written = config_of(tmp_path / "adapter")
    assert written["task_type"] is None
    assert written["modules_to_save"] == sorted(HEADS.get(name, ["classifier"]))
    base = CLASSES[name].from_pretrained(tmp_path / "base")
    with quiet(), torch.no_grad():
        real = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        np.testing.assert_allclose(outputs_of(ours, **inputs(name)), torch_logits(real, name).numpy(), atol=ATOL)
        real.save_pretrained(str(tmp_path / "again"))
    assert config_of(tmp_path / "again")["auto_mapping"] == written["auto_mapping"]
    jax.tree.map(np.testing.assert_array_equal, tensors(tmp_path / "again"), tensors(tmp_path / "adapter"))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "AutoModelForMultipleChoice" in card
    assert "task='MULTIPLE_CHOICE'" in card


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_we_read_what_peft_trained(name, tmp_path):
    """Without a task_type, the head among modules_to_save: what users of PEFT do."""
    model = theirs(name)
    model.save_pretrained(tmp_path / "base")
    targets = ["q_lin"] if name == "distilbert" else ["key"]
    lora = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, modules_to_save=HEADS.get(name, ["classifier"]),
        init_lora_weights=False,
    )  # fmt: skip
    with quiet():
        real = peft.get_peft_model(model, lora).eval()
        for parameter in real.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
        real.save_pretrained(str(tmp_path / "adapter"))
    ours = jpeft.import_peft(models.load(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        np.testing.assert_allclose(outputs_of(ours, **inputs(name)), torch_logits(real, name).numpy(), atol=ATOL)


@pytest.mark.parametrize("method", [jpeft.PromptTuning(num_tokens=2), jpeft.PrefixTuning(num_tokens=2)])
def test_virtual_tokens_are_refused_by_name(method, tmp_path):
    model = jpeft.adapt(build(config("bert"), TASK), method, key=jax.random.key(0))
    assert jax.eval_shape(lambda: model(**inputs("bert"))).shape == (2, 3)
    with pytest.raises(ValueError, match="PEFT has no name for the task MULTIPLE_CHOICE"):
        jpeft.export_peft(model, tmp_path)


def test_inputs_without_choices_are_refused():
    model = build(config("bert"), TASK)
    with pytest.raises(ValueError, match=r"\[batch, choices, seq\].*got \[3, 13\]"):
        model(np.ones((3, 13), int))
    with pytest.raises(ValueError, match=r"got \[2, 3, 13\], \[2, 2, 13\]"):
        model(np.ones((2, 3, 13), int), np.ones((2, 2, 13), int))
    with pytest.raises(ValueError, match="MULTIPLE_CHOICE gives one output per row"):
        model(np.ones((2, 3, 13), int), segment_ids=np.ones((2, 3, 13), int))
