# SPDX-License-Identifier: Apache-2.0
"""The program with every method that PEFT has a form for: trained, saved, exported, merged, used."""

import io
import sys

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jpeft.train import cli

SENTENCES = ["the film was good", "the plot is poor"]
KINDS = ["norm_tuning", "vera", *(pytest.param(kind, marks=pytest.mark.slow)
                                  for kind in ("ia3", "loha", "lokr", "oft", "fourierft"))]  # fmt: skip


def predicted(monkeypatch, *arguments):
    """[(label, probability)] of the sentences."""
    out = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        cli.main(["predict", *map(str, arguments), *SENTENCES])
    rows = [line.split("\t") for line in out.getvalue().splitlines()]
    return [label for label, *_ in rows], np.array([float(probability) for _, probability, *_ in rows])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_saved_exported_merged_and_used(kind, classify, tmp_path, monkeypatch):
    classify |= {"method": {"kind": kind}, "train": {"max_steps": 3, "batch_size": 16}}
    classify["data"] |= {"num_widths": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(classify))
    cli.main(["train", str(tmp_path / "run.yaml")])
    adapter = tmp_path / "run" / "adapter"
    assert all(np.abs(tensor).max() > 0 for tensor in load_file(adapter / "adapter_model.safetensors").values())

    cli.main(["export", "--adapter", str(adapter), "--out", str(tmp_path / "peft")])
    for name in ("adapter_config.json", "adapter_model.safetensors", "jpeft.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (adapter / name).read_bytes(), name

    cli.main(["merge", "--adapter", str(adapter), "--out", str(tmp_path / "merged")])
    labels, probabilities = predicted(monkeypatch, "--adapter", adapter)
    merged_labels, merged_probabilities = predicted(monkeypatch, "--model", tmp_path / "merged")
    assert merged_labels == labels
    np.testing.assert_allclose(merged_probabilities, probabilities, atol=2e-4)  # they are printed with four digits
