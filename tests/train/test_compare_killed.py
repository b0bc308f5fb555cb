# SPDX-License-Identifier: Apache-2.0
"""A study whose processes are killed, wherever they are, and which is begun again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

COMPARE = [sys.executable, "-c", "from jpeft.train.program import run; run()", "compare"]
#: What a study has just written when it is killed, below the folder of a run.
MOMENTS = {
    "a folder for a training": "train/*",
    "the first result": "result.json",
    "a trained adapter, not tested yet": "train/adapter/*.safetensors",
}
#: Relative error of figures in float32, where runs are trained beside others.
TOGETHER = 1e-6


def study(tree, tmp_path, name, lanes):
    tree = tree | {"out": str(tmp_path / name), "lanes": lanes, "seeds": [0, 1, 2]}
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file, tmp_path / name


@pytest.fixture(name="tree")
def _tree(classify, reviews):
    return {
        "models": {"tiny": {"path": str(classify["model"]["path"])}},
        "tasks": {
            "reviews": {
                "task": "SEQ_CLS",
                "data": classify["data"] | {"num_widths": 1},
                "test": str(reviews / "eval.jsonl"),
            }
        },
        "methods": {"lora": {"method": {"kind": "lora", "rank": 4, "targets": ["query", "value"]}}},
        "run": {"train": classify["train"], "optimizer": {"lr": 1e-2}},
        "baselines": ["majority"],
    }


def times(out, pattern):
    """When what is there under the runs was made."""
    found = set()
    for path in out.glob(f"runs/reviews/tiny/lora/*/{pattern}"):
        with contextlib.suppress(FileNotFoundError):  # it may be removed at any time
            found.add((path, path.stat().st_ctime_ns))
    return found


def killed(file, out, pattern):
    """Begins the study, and kills it and its processes when something new of the pattern is there."""
    before = times(out, pattern)
    process = subprocess.Popen([*COMPARE, str(file)], start_new_session=True, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (times(out, pattern) - before) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [1, 3])
def test_a_killed_study_goes_on_and_comes_to_the_same(lanes, tree, tmp_path):
    """After three kills the figures are those of a study that ran through, and no result was made twice."""
    file, out = study(tree, tmp_path, "ended", lanes)
    made: dict[str, int] = {}
    for pattern in MOMENTS.values():
        killed(file, out, pattern)
        for result in out.glob("runs/**/result.json"):
            assert made.setdefault(str(result), result.stat().st_ino) == result.stat().st_ino
    subprocess.run([*COMPARE, str(file)], check=True, stdout=subprocess.DEVNULL)
    assert made, "one result at least was made before the last end"
    assert all(os.stat(result).st_ino == number for result, number in made.items())
    through, other = study(tree, tmp_path, "through", lanes)
    subprocess.run([*COMPARE, str(through)], check=True, stdout=subprocess.DEVNULL)
    results = sorted(path.relative_to(out) for path in out.glob("runs/**/result.json"))
    assert results == sorted(path.relative_to(other) for path in other.glob("runs/**/result.json"))
    assert len(results) == 3
    for path in results:
        one, same = (json.loads((folder / path).read_text()) for folder in (out, other))
        assert one["test"] == pytest.approx(same["test"], rel=TOGETHER)
        assert one["eval"]["loss"] == pytest.approx(same["eval"]["loss"], rel=TOGETHER)
        assert [at["loss"] for at in one["curve"]] == pytest.approx([at["loss"] for at in same["curve"]], rel=TOGETHER)
        for kept in ("parameters", "adapter_kb", "collapsed", "train_labels"):
            assert one[kept] == same[kept]
    assert (out / "report.md").is_file()
