# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept in the user's folder, found by the next run, and no fault of theirs ends one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jpeft.train import compilation
from jpeft.train.compilation import VARIABLE, chosen, processor

HOME = Path("/home/me")


@pytest.mark.parametrize(
    "setting, environment, expected",
    [
        ("auto", {}, HOME / ".cache/jpeft/programs" / processor()),
        ("auto", {"XDG_CACHE_HOME": "/caches"}, Path("/caches/jpeft/programs") / processor()),
        ("auto", {"XDG_CACHE_HOME": "no/absolute/path"}, HOME / ".cache/jpeft/programs" / processor()),
        ("auto", {VARIABLE: "/mine"}, Path("/mine")),
        ("auto", {VARIABLE: "off"}, None),
        ("/named", {VARIABLE: "off"}, Path("/named")),
        (None, {VARIABLE: "/mine"}, None),
        ("off", {}, None),
    ],
)
def test_where_programs_lie(setting, environment, expected):
    assert chosen(setting, environment, lambda: HOME) == expected


def test_what_jax_was_told_stays():
    import jax

    before = jax.config.values["jax_compilation_cache_dir"]
    assert compilation.keep_programs() == f"compiled programs: as JAX was told, {before}"
    assert jax.config.values["jax_compilation_cache_dir"] == before


def started(config, *options, **environment):
    """What `jpeft train` says, in a process as a user's."""
    kept = {k: v for k, v in os.environ.items() if k not in (VARIABLE, "JAX_COMPILATION_CACHE_DIR")}
    code = "from jpeft.train import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(config), *options],
        env=kept | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_keeps_its_programs_and_survives_damaged_ones(classify, tmp_path):
    """Empty, found again, and with every entry damaged: the same losses, and never another exit code than 0."""
    run, caches = Path(classify["out"]), tmp_path / "caches"
    classify["train"] = {"max_steps": 2, "batch_size": 8, "log_every": 1}
    classify["data"].pop("eval")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(classify))
    user = {"XDG_CACHE_HOME": str(caches), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    said = started(file, "--overwrite", **user).stdout
    folder = caches / "jpeft" / "programs" / processor()
    assert f"compiled programs: kept in {folder}" in said
    first, entries = losses(run), {entry.name for entry in folder.glob("*-cache")}
    assert any("update" in name for name in entries)
    started(file, "--overwrite", **user)
    assert losses(run) == first
    assert {entry.name for entry in folder.glob("*-cache")} == entries
    for number, entry in enumerate(sorted(folder.glob("*-cache"))):
        whole = entry.read_bytes()
        entry.write_bytes(
            [b"", whole[: len(whole) // 2], bytes(len(whole)), whole[:40] + b"\xff" + whole[41:]][number % 4]
        )
    done = started(file, "--overwrite", **user)
    assert losses(run) == first
    assert "Error reading persistent compilation cache entry" in done.stderr
    assert "compiled programs: not kept" in started(file, "--no-compilation-cache", "--resume", **user).stdout


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    code = "from jpeft.train.compilation import keep_programs as k; print(k()); k('{}')".format(tmp_path / "file" / "x")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != VARIABLE} | {"XDG_CACHE_HOME": str(tmp_path / "file")},
    )  # fmt: skip
    assert "compiled programs: not kept, for" in done.stdout
    assert "Error" in done.stderr.splitlines()[-1]
