# SPDX-License-Identifier: Apache-2.0
"""What merging changes: the largest logit, KL and argmax against float64 formulas, its sample, and where it is told."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle as oracle
import pytest
import subjects
import yaml
from virtual_oracle import run

import jpeft
from jpeft.io import Sample, measure_drift

KEY = jax.random.key(0)
SAMPLE = Sample(oracle.IDS, oracle.MASK, "three rows")


def pair(family):
    """A model, and one that a rounded merge would be further from than any is."""
    model = subjects.fill(jpeft.adapt(oracle.jax_model(family), jpeft.LoRA(rank=2, targets="all-linear"), key=KEY))
    return model, jpeft.scale(model, 0.8)


def formula(one, other):
    """(KL(p || q), whether the argmax is the same) of two vectors of logits, term by term."""
    p, q = ([math.exp(float(x)) for x in logits] for logits in (one, other))
    terms = (a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return math.fsum(terms), p.index(max(p)) == q.index(max(q))


def vectors(outputs, task):
    """The distributions of the sample's rows, one by one."""
    if task == "SEQ_CLS":
        return list(outputs)
    if task == "QUESTION_ANS":
        return [outputs[row][oracle.MASK[row] == 1][:, end] for row in range(3) for end in (0, 1)]
    return [outputs[row, i] for row in range(3) for i in range(8) if oracle.MASK[row, i]]


def outputs(model):
    more = {}
    if model.task == "SEQ_2_SEQ_LM":
        more = {"decoder_input_ids": model.decoder_inputs(oracle.IDS), "decoder_attention_mask": oracle.MASK}
    return run(model, oracle.IDS, oracle.MASK, **more)


@pytest.mark.parametrize(
    "family",
    ["llama", "bert cls", *(pytest.param(f, marks=pytest.mark.slow) for f in ("t5", "bert answers", "bert tokens"))],
)
def test_it_is_the_formula(family):
    before, after = pair(family)
    drift = measure_drift(before, after, SAMPLE)
    pairs = list(zip(*(vectors(outputs(model), before.task) for model in (before, after)), strict=True))
    terms = [formula(*pair) for pair in pairs]
    assert drift.count == len(terms) == {"bert cls": 3, "bert answers": 6}.get(family, oracle.MASK.sum())
    assert drift.kl == pytest.approx(math.fsum(kl for kl, _ in terms) / len(terms), rel=1e-5)
    assert (drift.kl or 0) > 1e-4
    assert drift.agreement == sum(same for _, same in terms) / len(terms)
    assert drift.logit == pytest.approx(max(np.abs(a - b).max() for a, b in pairs), rel=1e-5)
    assert drift.largest == pytest.approx(max(np.abs(a).max() for a, _ in pairs), rel=1e-6)
    assert str(drift).endswith(f"in {sum(same for _, same in terms)} of {len(terms)}; on three rows")


def test_a_model_without_itself_has_none():
    before, _ = pair("llama")
    drift = measure_drift(before, before)
    assert (drift.logit, drift.kl, drift.agreement, drift.count) == (0, 0, 1, 64)
    assert drift.sample == "2 rows of 32 random tokens"


def test_states_are_no_distributions():
    before, after = pair("bert")
    drift = measure_drift(before, after)
    assert drift.kl is None
    assert drift.agreement is None
    assert drift.sample == "2 rows of 24 random tokens"  # all the positions that there are
    assert str(drift).startswith("a state moved by at most")


def test_a_quantized_base_is_merged_into_what_its_codes_stand_for(tmp_path):
    base = jpeft.quantize(oracle.jax_model("llama"), "int8")
    model = subjects.fill(jpeft.adapt(base, jpeft.LoRA(rank=2, targets=["q_proj"]), key=KEY))
    drift = jpeft.export_merged(model, tmp_path / "merged", base="org/model")
    assert drift.logit < 1e-5
    read = jpeft.models.load(tmp_path / "merged")
    expected = jpeft.partition(jpeft.dequantize(base))[2]["layers/mlp/down_proj/kernel"]
    np.testing.assert_array_equal(jpeft.partition(read)[2]["layers/mlp/down_proj/kernel"], expected)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "base_model": "org/model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jpeft", "merged"],
    }
    assert "    LoRA(rank=2, targets=('q_proj',))\n" in card
    assert f"| KL(adapted, merged), mean, nats | {drift.kl:.3g} |\n| same argmax | 100.00 % of 64 |\n" in card
    assert f"| largest difference of a logit | {drift.logit:.3g} |" in card
    assert "with the adapters beside it, on 2 rows of 32 random tokens:" in card


def test_what_cannot_be_compared_is_refused():
    before, _ = pair("bert cls")
    with pytest.raises(ValueError, match="models for SEQ_CLS and CAUSAL_LM have no outputs to compare"):
        measure_drift(before, pair("llama")[0])
    with pytest.raises(ValueError, match=r"a row of the sample \(none\) holds no token"):
        measure_drift(before, before, Sample(oracle.IDS, np.zeros_like(oracle.IDS), "none"))
    broken = subjects.fill(before, scale=float("nan"))
    with pytest.raises(ValueError, match=r"outputs on the sample \(three rows\) are not finite"):
        measure_drift(before, broken, SAMPLE)
    assert jnp.isfinite(outputs(before)).all()
