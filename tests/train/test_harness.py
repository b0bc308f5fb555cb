# SPDX-License-Identifier: Apache-2.0
"""The harness' three questions: against transformers with a stand-in for lm-eval, and against lm-eval's own model.

The stand-in has what `jpeft.train.harness` takes of lm-eval: the class that it derives from, and the registry. The slow
test takes lm-eval itself, from the interpreter that `$JPEFT_LM_EVAL_PYTHON` names.
"""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from harness_live import PAIRS, TEXTS, WRITES

#: Float32 sums of up to a hundred log-probabilities.
ROUNDING = 1e-4


class _Asked:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def harness(monkeypatch):
    """The module, on the stand-in."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    modules = {name: types.ModuleType(name) for name in names}
    modules["lm_eval.api.model"].LM = type("LM", (), {})
    modules["lm_eval.api.registry"].register_model = lambda name: lambda cls: cls
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("jpeft.train.harness")
    sys.modules.pop("jpeft.train.harness")


def torch_pair(model, before, after):
    """(log p, greedy) of ids behind others."""
    ids = torch.tensor([before + after])
    with torch.no_grad():
        logp = model(ids).logits[0].log_softmax(-1)[len(before) - 1 : -1]
    target = torch.tensor(after)
    return float(logp[range(len(after)), target].sum()), bool((logp.argmax(-1) == target).all())


def test_the_three_questions_are_answered_as_by_transformers(harness, llama):
    ours = harness.Jpeft(model=str(llama), batch_size=3, max_length=32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    words = transformers.AutoTokenizer.from_pretrained(llama)

    def ids(text):
        return words(text)["input_ids"]  # with [CLS] in front

    expected = [torch_pair(theirs, ids(a), ids(b)[1:]) for a, b in PAIRS]
    found = ours.loglikelihood([_Asked(*pair) for pair in PAIRS])
    np.testing.assert_allclose([pair[0] for pair in found], [pair[0] for pair in expected], atol=ROUNDING)
    assert [pair[1] for pair in found] == [pair[1] for pair in expected]

    totals = []
    for text in TEXTS:  # up to 82 tokens: three windows of 32, of which the last looks back as far as it can
        row = ids(text)
        pieces = [(row[max(0, min(at + 32, len(row)) - 33) : at] or [words.bos_token_id], row[at : at + 32])
                  for at in range(0, len(row), 32)]  # fmt: skip
        totals.append(sum(torch_pair(theirs, *piece)[0] for piece in pieces))
    found = ours.loglikelihood_rolling([_Asked(text) for text in TEXTS])
    np.testing.assert_allclose(found, totals, atol=ROUNDING)

    written = ours.generate_until([_Asked(*write) for write in WRITES])
    for (context, options), text in zip(WRITES, written, strict=True):
        start = torch.tensor([ids(context)])
        out = theirs.generate(start, max_new_tokens=options["max_gen_toks"], do_sample=False)
        expected = words.decode(out[0, start.shape[1] :], skip_special_tokens=True)
        for stop in options["until"]:
            expected = expected.partition(stop)[0]
        assert text.split() == expected.split()


def test_a_greedy_continuation_is_known(harness, llama):
    ours = harness.Jpeft(model=str(llama))
    text = ours.generate_until([_Asked("good film", {"until": [], "max_gen_toks": 3})])[0]
    found = ours.loglikelihood([_Asked("good film", " " + text.strip()), _Asked("good film", " the the the bad")])
    assert [greedy for _, greedy in found] == [bool(text.strip()), False]
    assert ours.loglikelihood([]) == []


def test_another_kind_of_model_is_refused(harness, bert):
    with pytest.raises(ValueError, match="the harness measures models for CAUSAL_LM; this one is for FEATURE_EXTRACT"):
        harness.Jpeft(model=str(bert))


@pytest.mark.slow
def test_lm_evals_own_model_says_the_same(llama):
    python = os.environ.get("JPEFT_LM_EVAL_PYTHON")
    if not python:
        pytest.skip("absent: lm-eval; name an interpreter that has it by JPEFT_LM_EVAL_PYTHON")
    script = Path(__file__).parents[1] / "harness_live.py"
    done = subprocess.run([python, str(script), str(llama)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = said["ours"], said["theirs"]
    for a, b in zip(ours["pairs"], theirs["pairs"], strict=True):
        assert a[0] == pytest.approx(b[0], abs=ROUNDING)
        assert a[1] == b[1]
    assert ours["texts"] == pytest.approx(theirs["texts"], abs=ROUNDING)
    assert [text.split() for text in ours["writes"]] == [text.split() for text in theirs["writes"]]
