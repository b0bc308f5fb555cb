# SPDX-License-Identifier: Apache-2.0
"""The templates for GPU clusters, run from end to end: real processes that find each other, stop, and go on."""

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import slurm_stand_in as slurm
import yaml
from test_multiprocess import SAME, figures, recipe

from jpeft.train.cli import main

TEMPLATES = Path(__file__).parents[1] / "tpu_scripts" / "gpu"
STEPS = ["train.max_steps=16", "train.save_every=2"]
#: Longer than any of it takes on a busy machine.
SECONDS = 240
#: Of a machine with one CPU device for each process.
CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(TEMPLATES.parents[1])}


@pytest.fixture(name="alone")
def _alone(tmp_path):
    """A configuration, and what one process makes of it."""
    config = recipe(tmp_path)
    main(["train", str(config), "--out", str(tmp_path / "alone"), *STEPS])
    return config, figures(tmp_path / "alone")


def wait_for_checkpoints(run, processes):
    """Until there are two, while the processes run."""
    end = time.monotonic() + SECONDS
    while len([*(run / "checkpoints").glob("[0-9]*")]) < 2:
        assert time.monotonic() < end, "no checkpoint"
        assert all(process.poll() is None for process in processes), "it ended"
        time.sleep(0.05)


def check(run, expected, said):
    """The losses are those of one process, though the run was made in two parts."""
    assert "resumed after update" in said, "it began anew"
    losses, evaluated = figures(run)
    assert len(losses) == 16
    np.testing.assert_allclose(losses, expected[0], rtol=0, atol=SAME)
    np.testing.assert_allclose(evaluated, expected[1], rtol=0, atol=SAME)


@pytest.mark.slow
def test_a_slurm_job_goes_on_after_its_time(tmp_path, alone):
    config, expected = alone
    batch, folder, run = TEMPLATES / "slurm.sbatch", tmp_path / "slurm", tmp_path / "run"
    programs = slurm.install(folder, batch)
    environment = {
        **os.environ, **CPU, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "JPEFT_VENV": str(folder), "SLURM_JOB_ID": "4711",
    }  # fmt: skip
    line = ["bash", str(batch), str(config), *STEPS]
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL) as job:
        wait_for_checkpoints(run, [job])
        (folder / "time-is-up").touch()
        assert job.wait(SECONDS) == 75
    assert (folder / "scontrol.log").read_text() == "requeue 4711\n"
    (folder / "time-is-up").unlink()
    again = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert again.returncode == 0, again.stderr
    assert (folder / "scontrol.log").read_text() == "requeue 4711\n"
    check(run, expected, again.stdout + again.stderr)


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (69, True), (75, True), (137, False)])
def test_a_slurm_job_is_begun_again_where_it_can_go_on(tmp_path, status, requeued):
    """75 is interrupted, 69 that another process was lost; the job ends with what `srun` ended with."""
    programs = slurm.install(tmp_path / "slurm", TEMPLATES / "slurm.sbatch")
    (programs / "srun").write_text(f"#!/bin/sh\nexit {status}\n")
    environment = {
        **os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "JPEFT_VENV": str(tmp_path / "slurm"),
        "SLURM_JOB_ID": "4713",
    }  # fmt: skip
    done = subprocess.run(["bash", str(TEMPLATES / "slurm.sbatch"), "config.yaml"], env=environment, check=False)
    assert done.returncode == status
    assert (tmp_path / "slurm" / "scontrol.log").exists() == requeued


@pytest.mark.slow
def test_a_slurm_job_that_fails_is_not_begun_again(tmp_path):
    batch, folder = TEMPLATES / "slurm.sbatch", tmp_path / "slurm"
    programs = slurm.install(folder, batch)
    environment = {
        **os.environ, **CPU, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "JPEFT_VENV": str(folder),
        "SLURM_JOB_ID": "4712",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(batch), str(tmp_path / "no.yaml")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode not in (0, 75)
    assert "no.yaml" in done.stderr
    assert not (folder / "scontrol.log").exists()


@pytest.mark.slow
def test_a_skypilot_job_goes_on_on_other_machines(tmp_path, alone):
    config, expected = alone
    template, run = yaml.safe_load((TEMPLATES / "skypilot.yaml").read_text()), tmp_path / "run"
    programs = slurm.install(tmp_path / "programs", TEMPLATES / "slurm.sbatch")
    home = tmp_path / "home"
    (home / "jpeft-venv").mkdir(parents=True)
    (home / "jpeft-venv" / "bin").symlink_to(programs)
    text = tmp_path / "steps.yaml"
    options = yaml.safe_load(config.read_text())
    options["train"] |= {"max_steps": 16, "save_every": 2}
    text.write_text(yaml.safe_dump(options))

    def nodes(stdout):
        """What SkyPilot says on each of two machines."""
        told = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "SKYPILOT_NUM_NODES": "2", "CONFIG": str(text)}
        return [
            subprocess.Popen(
                ["bash", "-c", template["run"]], stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **CPU, "HOME": str(home), **told, "SKYPILOT_NODE_RANK": str(rank)},
            )
            for rank in range(2)
        ]  # fmt: skip

    first = nodes(subprocess.DEVNULL)
    wait_for_checkpoints(run, first)
    for node in first:  # the machines are gone, with all that ran there
        os.killpg(node.pid, 9)
        node.wait()
    with (tmp_path / "log").open("w") as log:
        assert [node.wait(SECONDS) for node in nodes(log)] == [0, 0], (tmp_path / "log").read_text()
    check(run, expected, (tmp_path / "log").read_text())
