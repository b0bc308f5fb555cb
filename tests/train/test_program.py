# SPDX-License-Identifier: Apache-2.0
"""The console script starts itself once more, with huge pages, and only once."""

import os
import subprocess
import sys

from jpeft.train import program

PRINTS = (
    "import os, jpeft.train.cli as cli, jpeft.train.program as program; cli.main = lambda: print({}); program.run()"
)


def run(printed, **environment):
    kept = {name: value for name, value in os.environ.items() if name != program.VARIABLE}
    command = [sys.executable, "-c", PRINTS.format(printed), "train", "a b.yaml"]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_it_runs_with_huge_pages_and_its_own_arguments():
    assert run(f"os.environ['{program.VARIABLE}']") == program.HUGE_PAGES
    assert run("__import__('sys').argv[1:]") == "['train', 'a b.yaml']"


def test_the_settings_of_the_user_stay():
    assert run(f"os.environ['{program.VARIABLE}']", GLIBC_TUNABLES="glibc.malloc.check=0") == "glibc.malloc.check=0"


def test_where_it_starts_again():
    assert program.restart_environment("darwin", {}) is None
    assert program.restart_environment("linux", {program.VARIABLE: ""}) is None
    assert program.restart_environment("linux", {"A": "b"}) == {"A": "b", program.VARIABLE: program.HUGE_PAGES}
