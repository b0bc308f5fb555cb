# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept in the user's folder, found by the next run, and no fault of theirs ends one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jpeft.train import compilation, config
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


def started(file, *options, **environment):
    """What `jpeft train` says, in a process as a user's."""
    kept = {k: v for k, v in os.environ.items() if k not in (VARIABLE, "JAX_COMPILATION_CACHE_DIR")}
    code = "from jpeft.train import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(file), *options],
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


KEPT = """
import jax, jax.numpy as jnp, sys
from jpeft.train.compilation import keep_programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(keep_programs(sys.argv[1], None if sys.argv[2] == "None" else int(sys.argv[2])))
for number in range(4):
    w = jax.random.normal(jax.random.key(number), (300, 300 + number))  # a constant in the program: 0.3 MB and more
    jax.jit(lambda x, w=w: x @ w + number)(jnp.ones(300)).block_until_ready()
"""


def kept(folder, most_mb, **environment):
    """What is said, and the bytes of the programs that a process of its own then leaves."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith((VARIABLE, "JAX_COMPILATION_CACHE"))}
    done = subprocess.run(
        [sys.executable, "-c", KEPT, str(folder), str(most_mb)],
        env=clean | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done, sum(program.stat().st_size for program in folder.glob("*-cache"))


def test_programs_are_kept_up_to_a_size(tmp_path):
    """Without a bound they add up; with one, those of before that have no time of use go first, and new ones stay."""
    _, free = kept(tmp_path, None)
    assert free > 2**20
    old = {program.name for program in tmp_path.glob("*-cache")}
    assert not list(tmp_path.glob("*-atime"))
    for program in tmp_path.glob("*-cache"):
        program.rename(program.with_name("older-" + program.name))  # programs of another day
    done, bounded = kept(tmp_path, 1)
    assert "up to 1 MB" in done.stdout
    assert 0 < bounded <= 2**20
    left = {program.name for program in tmp_path.glob("*-cache")}
    assert left & old, "what was just compiled is kept"
    assert not done.stderr.count("Error writing persistent compilation cache entry")
    said, _ = kept(tmp_path, 1, JAX_COMPILATION_CACHE_MAX_SIZE=str(3 * 2**20))
    assert "up to 3 MB" in said.stdout


def test_a_bound_of_nothing_is_refused(classify):
    with pytest.raises(config.ConfigError, match="compilation_cache_mb must be 1 or more, got 0"):
        config.parse(config.overridden(classify, ["compilation_cache_mb=0"]))
