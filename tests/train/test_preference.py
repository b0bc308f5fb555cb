# SPDX-License-Identifier: Apache-2.0
"""Preference losses against their formulas, and against torch on the same model and adapter, losses and gradients."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_oracle as oracle
import pytest
import subjects
import torch

import jpeft
from jpeft.train import config, job, loop
from jpeft.train.losses import IGNORED, lm_log_probs
from jpeft.train.preference import PreferenceSums, preference_losses, reference_log_probs
from jpeft.train.records import DataError
from jpeft.train.sections import Preference
from jpeft.train.step import begin, make_step

#: float32 against float32 through two layers and the log-probabilities of up to eight tokens; gradients of norms.
THROUGH = 1e-5
WORDS = "good great fine bad poor dull film plot cast scene the a is was and".split()
LOSSES = [
    Preference(beta=0.3),
    Preference(beta=0.3, label_smoothing=0.2),
    Preference(loss="ipo", beta=0.4),
    Preference(loss="hinge", beta=0.7),
]


def named(options):
    return f"{options.loss}-{options.label_smoothing}"


@pytest.mark.parametrize("options", LOSSES, ids=named)
def test_a_pairs_loss_is_the_formula(options):
    delta = np.array([-30.0, -2.0, -0.1, 0.0, 0.4, 1.25, 40.0])
    x, e = options.beta * delta, options.label_smoothing
    expected = {
        "sigmoid": (1 - e) * np.logaddexp(0, -x) + e * np.logaddexp(0, x),
        "ipo": (delta - 0.5 / options.beta) ** 2,
        "hinge": np.maximum(0, 1 - x),
    }[options.loss]
    found = preference_losses(jnp.asarray(delta, jnp.float32), options)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def pairs(seed=0):
    """Three pairs of unequal lengths, and one of padding alone: `[8, 9]`, with prompts that are not learnt."""
    rng = np.random.default_rng(seed)
    lengths = np.array([9, 5, 7, 8, 4, 6, 1, 1])
    mask = np.arange(9) < lengths[:, None]
    ids = np.where(mask, rng.integers(1, 48, mask.shape), 0)
    ids[1::2, :2] = ids[0::2, :2]
    labels = np.where(mask & (np.arange(9) >= 2), ids, IGNORED)
    labels[6:] = IGNORED
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": labels}


def torch_log_probs(model, batch):
    """Of every row, in float64 from the logits on."""
    ids, mask, labels = (torch.tensor(batch[name]).long() for name in ("input_ids", "attention_mask", "labels"))
    logits = model(input_ids=ids, attention_mask=mask).logits.double()[:, :-1]
    targets = labels[:, 1:]
    chosen = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (chosen * (targets != IGNORED)).sum(1), (targets != IGNORED).sum(1)


def torch_loss(model, batch, options):
    """Mean over the pairs, with the rewards of both sides."""
    found, counts = torch_log_probs(model, batch)
    with torch.no_grad(), model.disable_adapter():
        reference, _ = torch_log_probs(model, batch)
    gains = found - reference
    if options.loss == "ipo":
        gains = gains / counts.clamp(min=1)
    chosen, rejected = gains[0::2], gains[1::2]
    real = counts[0::2] > 0
    delta = (chosen - rejected)[real]
    x, e = options.beta * delta, options.label_smoothing
    sigmoid = torch.nn.functional.logsigmoid
    losses = {
        "sigmoid": -(1 - e) * sigmoid(x) - e * sigmoid(-x),
        "ipo": (delta - 1 / (2 * options.beta)) ** 2,
        "hinge": torch.relu(1 - x),
    }[options.loss]
    return losses.mean(), options.beta * chosen[real], options.beta * rejected[real]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """peft's model, and jpeft's with the same adapter."""
    adapter = tmp_path_factory.mktemp("adapter")
    theirs = oracle.train_real(
        "llama", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj", "v_proj"]}, adapter, noise=0.1
    )
    return theirs, jpeft.import_peft(oracle.jax_model("llama"), adapter)


@pytest.mark.parametrize(
    "options",
    [pytest.param(loss, marks=[] if loss.label_smoothing else pytest.mark.slow) for loss in LOSSES],
    ids=named,
)
def test_losses_and_gradients_are_torchs_beside_peft(twins, options, tmp_path):
    theirs, model = twins
    batch, sums = pairs(), PreferenceSums(options)
    graphdef, trainable, frozen = jpeft.partition(model)

    def mean(trainable, batch):
        loss, count, figures = sums(jpeft.combine(graphdef, trainable, frozen), batch)
        return loss / count, {name: value / count for name, value in figures.items()}

    (loss, figures), gradients = jax.jit(jax.value_and_grad(mean, has_aux=True))(trainable, batch)
    expected, chosen, rejected = torch_loss(theirs, batch, options)
    theirs.zero_grad()
    expected.backward()
    expected, chosen, rejected = expected.detach(), chosen.detach(), rejected.detach()
    assert float(loss) == pytest.approx(float(expected), rel=THROUGH)
    assert float(figures["rewards_chosen"]) == pytest.approx(float(chosen.mean()), rel=THROUGH, abs=THROUGH)
    assert float(figures["rewards_rejected"]) == pytest.approx(float(rejected.mean()), rel=THROUGH, abs=THROUGH)
    assert float(figures["margin"]) == pytest.approx(float((chosen - rejected).mean()), rel=THROUGH, abs=THROUGH)
    assert float(figures["accuracy"]) == pytest.approx(float((chosen > rejected).double().mean()))
    jpeft.export_peft(jpeft.combine(graphdef, gradients, frozen), tmp_path / "gradients", base="base")
    found = oracle.tensors(tmp_path / "gradients")
    real = {n.replace(".default", ""): p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    assert found.keys() == real.keys()
    size = np.sqrt(sum((value**2).sum() for value in real.values()))
    assert size > 1e-3
    for name, value in real.items():
        assert np.linalg.norm(found[name] - value) < THROUGH * size, name


def test_the_reference_is_the_base_and_may_come_with_the_batch(twins):
    """Quantized or not, it reads the leaves that are there; computed before or now, the loss is the same."""
    theirs, model = twins
    batch = pairs()
    with torch.no_grad(), theirs.disable_adapter():
        expected, _ = torch_log_probs(theirs, batch)
    reference = reference_log_probs(model, batch)
    np.testing.assert_allclose(reference, expected, rtol=THROUGH, atol=1e-4)
    sums = PreferenceSums(Preference(beta=0.3))
    now, before = sums(model, batch), sums(model, {**batch, "reference": np.asarray(reference)})
    np.testing.assert_allclose(now[0], before[0], rtol=1e-6)
    coded = jpeft.quantize(jpeft.strip(model), "int8")
    adapted = jpeft.adapt(coded, jpeft.LoRA(rank=2, targets=["q_proj"]), key=jax.random.key(0))
    moved = subjects.fill(adapted)
    np.testing.assert_allclose(reference_log_probs(moved, batch), lm_log_probs(coded, batch), rtol=1e-6)
    assert not np.allclose(lm_log_probs(moved, batch), lm_log_probs(coded, batch), rtol=1e-3)


def test_a_preference_is_learnt_in_the_step_and_micro_batches_change_nothing(twins):
    _, model = twins
    fresh = jpeft.adapt(jpeft.strip(model), jpeft.LoRA(rank=4, alpha=8), key=jax.random.key(3))
    graphdef, trainable, frozen = jpeft.partition(fresh)
    batch = pairs()
    tx = optax.adam(1e-2)
    step = make_step(graphdef, PreferenceSums(Preference(beta=0.5)), tx)
    one = {name: jnp.asarray(value)[None] for name, value in batch.items()}
    two = {name: jnp.asarray(value).reshape(2, 4, *value.shape[1:]) for name, value in batch.items()}
    first = [step(begin(tx, trainable), frozen, arrays, None)[1] for arrays in (one, two)]
    assert float(first[0].loss) == pytest.approx(np.log(2), rel=1e-5)  # an adapter at its start is its reference
    assert float(first[0].labels) == float(first[1].labels) == 3
    np.testing.assert_allclose(first[0].grad_norm, first[1].grad_norm, rtol=1e-5)
    state = begin(tx, trainable)
    for _ in range(20):
        state, metrics = step(state, frozen, one, None)
    assert float(metrics.figures["accuracy"]) == 1.0
    assert float(metrics.figures["margin"]) > 1.0
    assert float(metrics.loss) < 0.3


def test_pairs_that_are_none(twins):
    _, model = twins
    sums = PreferenceSums(Preference())
    with pytest.raises(ValueError, match="chosen and rejected answers in turn; got 7 rows, an odd number"):
        sums(model, {name: value[:7] for name, value in pairs().items()})
    packed = {**pairs(), "segment_ids": np.ones((8, 9), int)}
    with pytest.raises(ValueError, match="packed examples have no log-probability of their own"):
        sums(model, packed)


@pytest.fixture
def preferring(llama, tmp_path):
    """A configuration of a tiny model that is to answer with praise."""
    rng = random.Random(0)
    for name, count in (("train", 64), ("eval", 24)):
        rows = []
        for _ in range(count):
            prompt, rest = (" ".join(rng.choice(WORDS[6:]) for _ in range(rng.randrange(2, 6))) for _ in range(2))
            good, bad = rng.choice(WORDS[:3]), rng.choice(WORDS[3:6])
            rows.append({"prompt": prompt, "chosen": f" {good} {rest} ", "rejected": f" {bad} {rest} "})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(llama), "task": "CAUSAL_LM"},
        "data": {
            "train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), "num_widths": 1,
            "format": "preference", "template": "plain",
        },
        "method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "embed_tokens"]},
        "optimizer": {"lr": 2e-2},
        "train": {
            "objective": "dpo", "epochs": 3, "batch_size": 8, "log_every": 4, "best": "accuracy", "dropout": False,
            "samples": ["plot"], "sample_tokens": 3,
        },
        "preference": {"beta": 0.3},
        "out": str(tmp_path / "run"),
    }  # fmt: skip


def test_a_run_learns_preferences_and_says_so(preferring, tmp_path):
    result = loop.train(config.parse(preferring))
    logged = [json.loads(line) for line in (result.adapter.parent / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in logged if "losses" in line]
    assert result.losses[0] == pytest.approx(np.log(2), rel=1e-5)
    assert updates[-1]["accuracy"] > 0.9
    assert updates[-1]["margin"] == pytest.approx(
        updates[-1]["rewards_chosen"] - updates[-1]["rewards_rejected"], rel=1e-4
    )
    assert result.evaluation.metrics["accuracy"] > 0.9  # of pairs that it has not seen
    assert result.evaluation.metrics["loss"] < 0.5


def test_references_that_are_computed_before_are_those_of_every_row(preferring):
    settings = config.parse(config.overridden(preferring, ["preference.precompute=true"]))
    plain = job.read_data(settings)
    parts = job.build(settings, None, None)
    dataset = job.with_references(plain, parts, None)
    base = jpeft.models.load(preferring["model"]["path"], "CAUSAL_LM")
    for split in (dataset.train, dataset.eval):
        batch = split.buckets.in_order()[1]
        arrays = {name: value[0] for name, value in split.collate(batch).items()}
        np.testing.assert_allclose(arrays["reference"], lm_log_probs(base, arrays), rtol=THROUGH, atol=1e-5)
        assert (arrays["reference"] < -1).all()


def test_rows_that_the_objective_has_no_use_for(preferring):
    likelihood = {key: value for key, value in preferring.items() if key != "preference"} | {"train": {"epochs": 1}}
    with pytest.raises(DataError, match=r"the columns prompt, chosen, rejected, which fit no form for CAUSAL_LM"):
        loop.train(config.parse(likelihood))
