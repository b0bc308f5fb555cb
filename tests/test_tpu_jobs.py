# SPDX-License-Identifier: Apache-2.0
"""The TPU scripts from end to end, against a stand-in `gcloud` that runs local processes as the workers."""

import json
import os
import re
import subprocess
from pathlib import Path

import gcloud_stand_in as cloud
import numpy as np
import pytest
from test_multiprocess import SAME, figures, recipe

from jpeft.train.cli import main

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
WHERE = ("pod", "us-central2-b", "project")
TYPE = ("--type", "v5litepod-8", "--version", "v2-alpha-tpuv5-lite")

#: Longer than any of it takes on a busy machine.
SECONDS = 240

#: Counts in the bucket, a line a step, whatever was counted before: the first worker writes, the others look on.
COUNT = """
while n=$(cat ~/bucket/steps 2>/dev/null | wc -l); [ $n -lt {steps} ]; do
  if [ $SLURM_PROCID = 0 ]; then date >> ~/bucket/steps; fi; sleep 0.2
done
"""


@pytest.fixture(name="folder")
def _folder(tmp_path, monkeypatch):
    """Where the stand-in keeps its state; it is first on PATH, and what it started is ended afterwards."""
    programs = cloud.install(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    yield tmp_path
    for vm in tmp_path.glob("vms/*"):
        cloud.kill(vm)


def run(script, *arguments, check=True):
    done = subprocess.run([SCRIPTS / script, *arguments], capture_output=True, text=True, check=False, timeout=SECONDS)
    assert not check or done.returncode == 0, done.stderr
    return done


def made(folder):
    """How many TPUs were asked for."""
    return sum("create" in call for call in cloud.calls(folder))


def test_one_is_created_awaited_used_and_given_back(folder):
    done = run("create.sh", *TYPE, "--spot", "--poll", "1", *WHERE)
    assert done.stderr.splitlines() == ["pod: WAITING_FOR_RESOURCES", "pod: ACTIVE"]
    assert "--spot" in cloud.calls(folder)[0]
    run("start.sh", *WHERE, 'echo "worker $SLURM_PROCID"; sleep 0.2; exit $SLURM_PROCID')
    status = [folder / "vms" / "pod" / f"worker-{worker}" / "jpeft-job" / "status" for worker in range(2)]
    cloud.wait_for(lambda: all(file.exists() and file.read_text() for file in status), 20, "the job's end")
    assert [file.read_text() for file in status] == ["0\n", "1\n"]
    assert run("logs.sh", "--no-follow", *WHERE).stdout == "worker 0\n"
    assert run("logs.sh", "--no-follow", "--worker", "1", *WHERE).stdout == "worker 1\n"
    run("fetch.sh", *WHERE, "~/jpeft-job", str(folder / "here"))
    assert (folder / "here" / "jpeft-job" / "log").read_text() == "worker 0\n"
    run("delete.sh", *WHERE)
    assert not [*folder.glob("vms/*")]


def test_a_job_that_runs_is_not_started_again(folder):
    run("create.sh", *TYPE, "--poll", "1", *WHERE)
    run("start.sh", *WHERE, "sleep 60")
    again = run("start.sh", *WHERE, "sleep 60", check=False)
    assert again.returncode != 0
    assert "a job runs already" in again.stderr


def test_waiting_ends_at_the_deadline_and_where_the_request_fails(folder):
    request = folder / "resources" / "pod"
    request.parent.mkdir()
    (folder / "bin" / "gcloud").write_text(f'#!/bin/sh\n[ "$4" = create ] || cat {request}\n')
    request.write_text("WAITING_FOR_RESOURCES")
    late = run("create.sh", *TYPE, "--poll", "1", "--deadline", "1", *WHERE, check=False)
    assert late.returncode == 4
    assert "pod is WAITING_FOR_RESOURCES after 1 s" in late.stderr
    request.write_text("FAILED")
    failed = run("create.sh", *TYPE, *WHERE, check=False)
    assert failed.returncode == 3
    assert "pod is FAILED" in failed.stderr


def test_slices_are_told_which_they_are(folder):
    run("create.sh", *TYPE, "--slices", "2", "--poll", "1", *WHERE)
    assert sorted(vm.name for vm in folder.glob("vms/*")) == ["pod-0", "pod-1"]
    run("start.sh", "--slices", "2", *WHERE, "env | grep MEGASCALE | sort; pwd")
    said = [folder / "vms" / f"pod-{i}" / "worker-1" / "jpeft-job" / "log" for i in range(2)]
    cloud.wait_for(lambda: all(file.exists() and "worker-1" in file.read_text() for file in said), 20, "the slices")
    for slice_, file in enumerate(said):
        assert file.read_text().split() == [
            "MEGASCALE_COORDINATOR_ADDRESS=127.0.0.1:8080",
            "MEGASCALE_NUM_SLICES=2",
            f"MEGASCALE_SLICE_ID={slice_}",
            str(file.parents[1]),  # the worker's home
        ]
    done = run("run_on_all_workers.sh", "--slices", "2", *WHERE, "pwd")
    assert len(done.stdout.split()) == 4
    assert run("run_on_all_workers.sh", "--slices", "2", *WHERE, "exit 3", check=False).returncode == 3


def sees_through(folder, line, *setup, until):
    """`resume.sh` of a job, whose TPU is taken away once `until` holds; its output and status."""
    create = f"{' '.join(TYPE)} --spot"
    arguments = ["--create", create, "--setup", " ".join(("--bucket", "runs", *setup)), "--poll", "1", *WHERE, line]
    log = folder / "resume.log"
    with log.open("w") as file, subprocess.Popen([SCRIPTS / "resume.sh", *arguments], stderr=file, stdout=file) as job:
        try:
            cloud.wait_for(lambda: until() or job.poll() is not None, SECONDS, "the first steps")
            assert job.poll() is None, log.read_text()
            cloud.preempt(folder, "pod")
            job.wait(SECONDS)
        finally:
            job.kill()
    return log.read_text(), job.returncode


@pytest.mark.slow
def test_a_job_goes_on_on_another_tpu_when_its_own_is_taken_away(folder):
    """Two real processes that sum over both their devices in every step, and a checkpoint in the bucket."""
    steps, checkpoint = 40, folder / "buckets" / "runs" / "job" / "checkpoint.json"
    job = Path(__file__).with_name("tpu_job.py")
    log, status = sees_through(
        folder,
        f"python {job} ~/bucket/job {steps} 0.2",
        until=lambda: checkpoint.exists() and json.loads(checkpoint.read_text())["step"] >= 3,
    )
    assert status == 0, log
    assert "pod is SUSPENDED: it is deleted, and another made" in log
    assert made(folder) == 2
    assert json.loads(checkpoint.read_text()) == {"step": steps, "sum": steps * 3.0}  # ranks 1 + 2
    said = [folder / "vms" / "pod" / f"worker-{worker}" / "jpeft-job" / "log" for worker in range(2)]
    for worker, file in enumerate(said):
        first = next(line for line in file.read_text().splitlines() if line.startswith("process"))
        start = int(first.removeprefix(f"process {worker} of 2 from step "))
        assert 3 <= start < steps, "it began anew"
    run("fetch.sh", "--bucket", "runs", "job", str(folder / "fetched"))
    assert json.loads((folder / "fetched" / "checkpoint.json").read_text())["step"] == steps


@pytest.mark.slow
def test_a_training_goes_on_on_another_tpu(folder, monkeypatch):
    """`jpeft train --resume` on two workers: taken away and gone on with, it has the losses of one process alone."""
    bucket = folder / "buckets" / "runs"
    bucket.mkdir(parents=True)
    config, steps = recipe(bucket), ["train.max_steps=16", "train.save_every=2"]
    main(["train", str(config), "--out", str(folder / "alone"), *steps])
    for name, value in (("JAX_PLATFORMS", "cpu"), ("JAX_NUM_CPU_DEVICES", "1"), ("PYTHONPATH", str(SCRIPTS.parent))):
        monkeypatch.setenv(name, value)
    line = f"jpeft train {config} --resume --distributed auto --mesh data=2 --out ~/bucket/run {' '.join(steps)}"
    log, status = sees_through(folder, line, until=lambda: len([*(bucket / "run" / "checkpoints").glob("[0-9]*")]) > 1)
    said = [file.read_text() for file in folder.glob("vms/pod/worker-*/jpeft-job/log")]
    assert status == 0, "\n".join([log, *said])
    assert made(folder) == 2
    assert any("resumed after update" in text for text in said), "it began anew"
    losses, evaluated = figures(bucket / "run")
    expected, expected_evaluation = figures(folder / "alone")
    assert len(losses) == 16
    np.testing.assert_allclose(losses, expected, rtol=0, atol=SAME)
    np.testing.assert_allclose(evaluated, expected_evaluation, rtol=0, atol=SAME)
    names = [sorted(file.name for file in (run / "adapter").iterdir()) for run in (bucket / "run", folder / "alone")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_loop_of_shell_goes_on_where_it_was(folder):
    steps = folder / "buckets" / "runs" / "steps"
    line = COUNT.format(steps=20)
    log, status = sees_through(folder, line, until=lambda: steps.exists() and len(steps.read_text().splitlines()) >= 2)
    assert status == 0, log
    assert made(folder) == 2
    assert len(steps.read_text().splitlines()) == 20
    assert "jpeft[train] jax[tpu]" in (folder / "pip.log").read_text()


@pytest.mark.parametrize("code", ["75", "$((SLURM_PROCID ? 69 : 75))"], ids=["interrupted", "one is lost"])
def test_a_command_that_can_go_on_is_started_again(folder, code):
    line = f"[ -e again ] && exit 0; touch again; exit {code}"
    done = run("resume.sh", "--create", " ".join(TYPE), "--poll", "1", *WHERE, line)
    assert done.stderr.splitlines()[-1] == "resume.sh: done"
    assert sum("setsid" in call[-1] for call in cloud.calls(folder)) == 2
    assert made(folder) == 1


def test_a_command_that_fails_ends_the_watch(folder):
    options = ("--create", " ".join(TYPE), "--poll", "1")
    done = run("resume.sh", *options, *WHERE, "exit $SLURM_PROCID", check=False)
    assert done.returncode == 1
    assert re.search("the command failed, worker by worker: (0 1|1 0)", done.stderr)  # in the order of their answers
    assert made(folder) == 1
