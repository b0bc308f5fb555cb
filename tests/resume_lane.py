# SPDX-License-Identifier: Apache-2.0
"""Kills runs at chosen and at random moments, resumes them, and compares them with runs left alone, bit by bit.

  make resume                                     # python tests/resume_lane.py; writes docs/results/resume.md
  python tests/resume_lane.py --only "lora, packing" --kills 2

Every process is forked from this one before JAX has started anything, so that none waits for imports. A child is armed
with one moment, and kills itself there: no clean-up of any kind runs.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
UPDATES = 24  # of a run
TIMES = {"seconds", "tokens_per_s", "padded_tokens_per_s", "mfu", "data_wait", "peak_memory_mb"}
#: Where a child is killed; the number is which update, save or evaluation it is.
MOMENTS = (
    "in the step",
    "at an epoch's edge",
    "in evaluation",
    "in the save",
    "before the rename",
    "as best/ is replaced",
    "at a random time",
)

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
    "dora": {"kind": "dora", "rank": 4, "alpha": 8, "dropout": 0.1},
    "prefix": {"kind": "prefix_tuning", "num_tokens": 3, "projection": True, "hidden_size": 8},
    "adalora": {"kind": "adalora", "init_rank": 4, "target_rank": 2, "total_steps": UPDATES, "tinit": 4, "tfinal": 6},
    "bottleneck": {"kind": "pfeiffer"},
}
#: What the runs differ in beside the method; each also has dropout, a schedule with warm-up and a best adapter.
SHAPES: dict[str, dict[str, Any]] = {
    "packing": {"data": {"packing": "best_fit"}, "train": {"batch_size": 4}},
    "accumulation": {"data": {"num_widths": 2}, "train": {"batch_size": 4, "accumulation": 4}},
    "a stream": {"data": {"streaming": True, "window": 50, "num_widths": 2}, "train": {"batch_size": 4, "ema": 0.9}},
    "a packed stream": {"data": {"streaming": True, "window": 50, "packing": "best_fit"}, "train": {"batch_size": 4}},
    "preferences": {"data": {"template": "plain", "num_widths": 1}, "train": {"batch_size": 12, "objective": "dpo"}},
    "preferences, precomputed": {
        "data": {"template": "plain", "num_widths": 1},
        "train": {"batch_size": 12, "objective": "dpo"},
        "preference": {"precompute": True},
    },
}
#: What is killed: every method with the two ways to make a batch, and the other kinds of data with one method.
CASES = [(method, shape) for method in METHODS for shape in ("packing", "accumulation")] + [
    ("lora", shape) for shape in SHAPES if shape not in ("packing", "accumulation")
]


def configuration(folder: Path, method: str, shape: str) -> dict[str, Any]:
    """A run on the tiny Llama in `folder`."""
    own = SHAPES[shape]
    rows = "pairs" if own["train"].get("objective") == "dpo" else "texts"
    data = {"train": str(folder / f"{rows}.train.jsonl"), "eval": str(folder / f"{rows}.eval.jsonl")}
    return {
        "model": {"path": str(folder / "llama"), "task": "CAUSAL_LM"},
        "data": data | {"max_length": 24} | own.get("data", {}),
        "method": METHODS[method],
        "optimizer": {"lr": 1e-2, "schedule": "cosine", "warmup": 0.2},
        "train": {"max_steps": UPDATES, "log_every": 5, "eval_every": 6, "save_every": 4, "best": "loss"}
        | own["train"],
    } | {name: own[name] for name in own.keys() & {"preference"}}


def prepare(folder: Path) -> None:
    """Writes the model, the tokenizer and the data; run in a child."""
    import jax

    import jpeft

    small: Any = runpy.run_path(str(ROOT / "tests" / "train" / "conftest.py"))
    (folder / "llama").mkdir(parents=True)
    jpeft.models.save(jpeft.models.build(small["LLAMA"], key=jax.random.key(0)), folder / "llama")
    small["_write_tokenizer"](folder / "llama", ends=False)
    for name, count, seed in (("train", 150, 0), ("eval", 30, 1)):
        texts = [row["text"] for row in small["_sentences"](count, seed)]
        thirds = [(text.split()[:1], text.split()[1:], text.split()[:0:-1]) for text in texts]
        pairs = [dict(zip(("prompt", "chosen", "rejected"), map(" ".join, third), strict=True)) for third in thirds]
        for kind, rows in (("texts", [{"text": text} for text in texts]), ("pairs", pairs)):
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / f"{kind}.{name}.jsonl").write_text("".join(lines))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(owner: Any, name: str, number: int, *, after: bool) -> None:
    """Kills the process at the `number`-th call of a method, before it or after it."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def armed(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == number
        if last and not after:
            kill()
        out = real(*args, **kwargs)
        if last:
            kill()
        return out

    setattr(owner, name, armed)


def delayed(seconds: float) -> None:
    """Kills the process from a thread, whatever it is at then."""
    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()


def arm(moment: str, number: float) -> None:
    """Sets the one kill of this process."""
    from jpeft.io import checkpoint
    from jpeft.train import evaluate, watch

    match moment:
        case "in the step" | "at an epoch's edge":
            counted(watch.Watch, "update", int(number), after=True)
        case "in the save":
            saved, whole = checkpoint.Checkpoints.save, int(number)
            calls = iter(range(1, 10**6))

            def save(self: Any, *args: Any) -> None:
                saved(self, *args)
                if next(calls) == whole:
                    delayed(0.1 * (number - whole))

            checkpoint.Checkpoints.save = save
        case "before the rename":
            counted(checkpoint, "seal", int(number), after=True)
        case "in evaluation":
            started = evaluate.Evaluator.__init__

            def begun(self: Any, *args: Any) -> None:
                started(self, *args)
                counted(self, "_compute", int(number), after=True)

            evaluate.Evaluator.__init__ = begun
        case "as best/ is replaced":  # between the renames of old and new, or after both
            counted(Path, "rename", int(number), after=True)
        case "at a random time":
            delayed(number)


def train(tree: dict[str, Any], moment: str | None, number: float, log: str) -> None:
    """What a child does: the run, or as much of it as it lives for."""
    import jax

    for stream in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY), stream)
    jax.config.update("jax_compilation_cache_dir", str(Path(tree["model"]["path"]).parent / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from jpeft.train import config, loop

    if moment is not None:
        arm(moment, number)
    loop.train(config.parse(tree), resume=True)


def child(target: Callable[..., None], *args: Any) -> int:
    """The exit code of a forked process; negative is a signal."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def figures(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


def weights(out: Path) -> dict[str, bytes]:
    """All weights that a run left: its adapter and its best."""
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.glob("*/*.safetensors"))}


def chosen(rng: random.Random, moment: str, done: int, seconds: float, epoch: int) -> float:
    """Which update, file, save, evaluation or second of the next process is its last."""
    left = UPDATES - done
    match moment:
        case "in the step":
            return rng.randint(1, max(left - 1, 1))
        case "at an epoch's edge":
            return -(-(done + 1) // epoch) * epoch - done
        case "in the save":
            return rng.randint(1, 2) + rng.random()
        case "before the rename":
            return rng.randint(1, 2)
        case "in evaluation":
            return rng.randint(1, 12)
        case "as best/ is replaced":
            return rng.randint(1, 2)
    return rng.uniform(0.3, 0.9) * seconds


def newest(out: Path) -> int:
    folder = out / "checkpoints"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), default=0)


def case(folder: Path, method: str, shape: str, kills: int, rng: random.Random) -> list[dict[str, Any]]:
    """Runs one configuration whole, then killed and resumed until every kill has come; a row for each kill."""
    tree = configuration(folder, method, shape)
    whole, parts, log = folder / "whole", folder / "parts", folder / "log"
    start = time.time()
    _run(tree | {"out": str(whole)}, None, 0, log)
    seconds, rows, open_ended = time.time() - start, [], []
    epoch = int(re.findall(r"([\d,]+) an epoch", log.read_text())[0].replace(",", ""))  # of a stream: of a window
    wanted = rng.sample(MOMENTS * -(-kills // len(MOMENTS)), kills)
    for _ in range(10 * kills):
        done, start = newest(parts), time.time()
        number = chosen(rng, wanted[0], done, seconds, epoch) if wanted else 0
        if wanted and _run(tree | {"out": str(parts)}, wanted[0], number, log):
            row = {"method": method, "shape": shape, "moment": wanted.pop(0), "from": done, "then": newest(parts)}
            open_ended.append(row)
            seconds = max(time.time() - start, 2.0)
            continue
        if not wanted and open_ended:
            _run(tree | {"out": str(parts)}, None, 0, log)
        same = figures(whole) == figures(parts) and weights(whole) == weights(parts) and bool(weights(parts))
        rows += [row | {"same": same} for row in open_ended]
        open_ended = []
        shutil.rmtree(parts)
        if not wanted:
            break
    for left in (whole, log):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if len(rows) < kills:
        raise RuntimeError(f"{method}, {shape}: {len(rows)} of {kills} kills came")
    return rows


def _run(tree: dict[str, Any], moment: str | None, number: float, log: Path) -> bool:
    """Whether a run was killed; False is one that came to its end."""
    code = child(train, tree, moment, number, str(log))
    if code not in (0, -signal.SIGKILL) or (code and moment is None):
        raise RuntimeError(f"{tree['out']}, to be killed {moment}, ended with {code}:\n{log.read_text()[-3000:]}")
    return code != 0


def cells(rows: list[dict[str, Any]], seconds: float) -> list[str]:
    """A configuration's line of the page."""
    import jax

    counts = [str(sum(row["moment"] == moment for row in rows) or "") for moment in MOMENTS]
    same = f"{sum(row['same'] for row in rows)} of {len(rows)}"
    run = f"{time.strftime('%Y-%m-%d')}, jax {jax.__version__}, {os.cpu_count()} cores, {seconds:.0f} s"
    return [rows[0]["method"], rows[0]["shape"], *counts, same, run]


def page(table: list[list[str]]) -> str:
    """docs/results/resume.md."""
    same, kills = (sum(int(line[-2].split(" of ")[at]) for line in table) for at in (0, 1))
    out = [
        "# Killed and resumed\n",
        f"Written by `make resume` (`tests/resume_lane.py`), on a CPU. A Llama of 2 layers and d=32 is trained for "
        f"{UPDATES} updates with dropout, a cosine schedule with warm-up, an evaluation every 6 updates, the best "
        "adapter kept and a checkpoint every 4 updates. Processes are killed by SIGKILL and started again with "
        "`--resume` until the run is through. It counts "
        "as the same where every line of metrics.jsonl (all losses, gradient norms, learning rates, evaluations; times "
        "left out) and every byte of adapter/ and best/ equal those of a run that was never stopped.\n",
        f"**{same} of {kills} kills: the same run, bit for bit.**\n",
        "| method | with | " + " | ".join(MOMENTS) + " | same | run |",
        "|---|---|" + "---|" * (len(MOMENTS) + 2),
        *(f"| {' | '.join(line)} |" for line in table),
    ]
    return "\n".join(out) + "\n"


def kept(text: str) -> dict[tuple[str, str], list[str]]:
    """The lines of a page, by method and shape."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {(line[0], line[1]): line for line in split if (line[0], *line[1:2]) in CASES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", metavar="TEXT", help="configurations with this in 'method, shape'; the page keeps the rest"
    )
    parser.add_argument("--kills", type=int, default=len(MOMENTS), help="of each configuration")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for module in "jpeft.train.loop orbax.checkpoint transformers tokenizers datasets pydantic yaml matplotlib".split():
        importlib.import_module(module)  # before the forks
    place, failed = ROOT / "docs" / "results" / "resume.md", False
    table = kept(place.read_text()) if options.only and place.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if child(prepare, folder):
            raise RuntimeError("the model and the data could not be written")
        for method, shape in CASES:
            if (options.only or "") not in f"{method}, {shape}":
                continue
            begun = time.time()
            found = case(folder, method, shape, options.kills, random.Random(f"{options.seed} {method} {shape}"))
            failed = failed or not all(row["same"] for row in found)
            table[method, shape] = cells(found, time.time() - begun)
            place.write_text(page([table[case] for case in CASES if case in table]))
            print(f"{method}, {shape}: {table[method, shape][-2]} the same", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
