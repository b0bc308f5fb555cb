# SPDX-License-Identifier: Apache-2.0
"""Runs of several real processes that are killed, interrupted, and gone on with: as before, or on another mesh."""

import json
import re
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import run_all, train
from safetensors.numpy import load_file
from test_multiprocess import recipe

import jpeft
from jpeft.io.checkpoint import steps
from jpeft.train.exits import INTERRUPTED, LOST

pytestmark = pytest.mark.slow

#: Losses in float32 of the same run on another mesh: sums of the same terms in another order, and what follows.
SAME = 1e-5
TIMES = {"seconds", "tokens_per_s", "padded_tokens_per_s", "mfu", "data_wait", "peak_memory_mb"}
SETTINGS = [f"train.{each}" for each in "max_steps=6 log_every=2 eval_every=3 save_every=1 best=loss".split()]


@pytest.fixture(scope="module", name="config")
def _config(tmp_path_factory) -> Path:
    return recipe(tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module", name="whole")
def _whole(config) -> Path:
    """The run in one process on one device, never stopped."""
    return finished(config, "whole", count=1)


def finished(config: Path, name: str, *options: str, count: int, resume: bool = False) -> Path:
    """A run's folder, once its processes have all ended well."""
    out = config.parent / name
    ended = train(config, *SETTINGS, f"out={out}", *options, *(["--resume"] if resume else []), count=count)
    assert [code for code, _ in ended] == [0] * count, "\n".join(text for _, text in ended)
    return out


def lines(run: Path) -> list[dict]:
    """What a run measured, without times."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


def losses(run: Path) -> list[float]:
    """Of all updates, then of all evaluations."""
    found = lines(run)
    return [x for line in found for x in line.get("losses", [])] + [x["eval_loss"] for x in found if "eval_loss" in x]


def adapters(run: Path) -> list[bytes]:
    return [(run / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "best")]


def test_two_processes_that_are_killed_go_on_as_if_they_were_not(config):
    """Process 1, then process 0 after they began again; the other ends by itself, and says who is gone."""
    unbroken = finished(config, "unbroken", "mesh=data=2", count=2)
    out = config.parent / "broken"
    for killed, number in ((1, 3), (0, 2)):
        options = [*SETTINGS, f"out={out}", "mesh=data=2", "--resume"]
        ended = train(config, *options, count=2, killed=killed, number=number)
        assert [code for code, _ in ended] == [LOST if own != killed else -signal.SIGKILL for own in (0, 1)]
        assert re.search(rf"jpeft: lost: process {killed} \(.*\) of 2 is gone", ended[1 - killed][1])
        assert steps(out / "checkpoints")
    assert finished(config, "broken", "mesh=data=2", count=2, resume=True) == out
    assert len(json.loads((out / "run.json").read_text())["resumed"]) == 2
    assert lines(out) == lines(unbroken)
    assert adapters(out) == adapters(unbroken)


def test_an_interruption_of_one_process_is_one_of_all(config):
    """SIGTERM to one: both save after the same update, and end with the code that says: start again."""
    out = config.parent / "interrupted"
    options = [*SETTINGS, f"out={out}", "mesh=data=2", "train.save_every=null"]
    ended = train(config, *options, count=2, killed=1, number=2, how="SIGTERM")
    assert [code for code, _ in ended] == [INTERRUPTED] * 2
    (step,) = steps(out / "checkpoints")
    assert 2 <= step <= 6
    for _, text in ended:
        assert f"interrupted after update {step}" in text


def test_a_run_goes_on_in_four_processes_in_two_and_in_one(config, whole):
    """Trained, evaluated and saved on three meshes: the losses and the adapter of one device."""
    out = config.parent / "moving"
    for count, mesh, killed, number in ((4, "data=2,fsdp=2", 2, 3), (2, "fsdp=2", 0, 2)):
        ended = train(
            config, *SETTINGS, f"out={out}", f"mesh='{mesh}'", "--resume", count=count, killed=killed, number=number
        )
        codes = [-signal.SIGKILL if own == killed else LOST for own in range(count)]
        assert [code for code, _ in ended] == codes, "\n".join(text for _, text in ended)
        assert all(f"process {killed} (" in text for own, (_, text) in enumerate(ended) if own != killed)
    finished(config, "moving", count=1, resume=True)
    resumed = json.loads((out / "run.json").read_text())["resumed"]
    assert [len(note["changed"]) for note in resumed] == [2, 2], resumed  # the mesh, and the number of processes
    compared(out, whole)


@pytest.mark.parametrize("count, mesh", [(2, "tensor=2"), (4, "fsdp=2,tensor=2")])
def test_several_processes_give_what_one_device_gives(config, whole, count, mesh):
    """Trained from the beginning; and what the adapter of one device writes, they write."""
    compared(finished(config, mesh.replace(",", "_"), f"mesh='{mesh}'", count=count), whole)
    folders = str(config.parent / "model"), str(whole / "adapter")
    ended = run_all(lambda port, own: [sys.executable, __file__, *folders, mesh, port, str(count), str(own)], count)
    assert [code for code, _ in ended] == [0] * count, "\n".join(text for _, text in ended)
    expected = written(*folders, None)
    assert len({token for row in expected for token in row}) > 3
    assert [json.loads(text.splitlines()[-1]) for _, text in ended] == [expected] * count


def written(base: str, adapter: str, mesh) -> list[list[int]]:
    """The likeliest tokens after two prompts, one of them padded."""
    model = jpeft.models.load(base, sharding=None if mesh is None else jpeft.placement(mesh))
    model = jpeft.import_peft(model, adapter)
    ids = np.array([[5, 9, 33, 2], [0, 0, 17, 40]], np.int32)
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]], np.int32)
    found = jpeft.models.generate(model if mesh is None else jpeft.shard(model, mesh), ids, mask, max_new_tokens=6)
    return np.asarray(jpeft.gather(found)).tolist()


def main(base: str, adapter: str, mesh: str, port: str, count: str, own: str) -> None:
    """One of several processes that write together."""
    jax.distributed.initialize(f"localhost:{port}", int(count), int(own))
    print(json.dumps(written(base, adapter, jpeft.mesh(mesh))))


def compared(run: Path, whole: Path) -> None:
    """Losses of updates and evaluations, and the adapter's leaves, within rounding."""
    found, expected = losses(run), losses(whole)
    assert len(expected) == 8
    assert expected[0] - expected[5] > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=SAME)
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, whole))
    assert one.keys() == other.keys()
    for name, value in other.items():
        np.testing.assert_allclose(one[name], value, rtol=0, atol=SAME, err_msg=name)


if __name__ == "__main__":
    main(*sys.argv[1:])
