# SPDX-License-Identifier: Apache-2.0
"""The zoo in float64 throughout: no norm, softmax, table or product of it is narrower than what it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
import torch
import transformers
from zoo_reference import batch, by_row, labels_of, outputs_of, seen, torch_model, torch_output
from zoo_subjects import SUBJECTS

from jpeft import models

#: Some hundred roundings of 2^-53 in a row; one number of float32 among them would show at 1e-8.
FLOAT64 = 1e-10


@pytest.fixture(name="wide_torch")
def _wide_torch(monkeypatch):
    """transformers' own places of float32 (norms, softmax, rotary tables) in float64, while a model is made and run."""
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    monkeypatch.undo()
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", SUBJECTS)
def test_float64_stays_float64(name, tmp_path, request):
    subject = SUBJECTS[name]
    task = next(task for task in subject.classes if not by_row(task))
    narrow, inputs = torch_model(subject.config, task, subject.classes), batch(subject)
    narrow.save_pretrained(tmp_path)
    weights = narrow.state_dict()
    request.getfixturevalue("wide_torch")
    config = transformers.AutoConfig.for_model(**subject.config, num_labels=labels_of(task))
    config._experts_implementation = "eager"  # the other one has no float64
    theirs = subject.classes[task]._from_config(config, attn_implementation="eager").double().eval()
    theirs.load_state_dict(weights)
    given = {key: value.astype(np.float64) if value.dtype == np.float32 else value for key, value in inputs.items()}
    expected = torch_output(theirs, task, given).detach()
    assert expected.dtype == torch.float64
    with jax.enable_x64(True):
        outputs = outputs_of(subjects.in_float64(models.load(tmp_path)), **given)
    assert outputs.dtype == jnp.float64
    real = seen(inputs, task)
    assert subjects.error(outputs[real], expected.numpy()[real]) < FLOAT64
