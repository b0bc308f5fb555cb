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


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda script: script.name)
def test_every_script_is_strict_executable_and_valid(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK), "not executable"
    assert "--dry-run" in run("--help", script=script).stdout
    subprocess.run(["bash", "-n", str(script)], check=True)
