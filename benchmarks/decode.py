# SPDX-License-Identifier: Apache-2.0
"""Greedy generation beside `transformers.generate`: same weights, same cores, float32, one run, in turns.

    python benchmarks/decode.py [--cores 2] [--new 64] [--steps 2] [--repeats 5] [--batches 1 8] [--json FILE]

The models are a random Llama of 4 layers and d=256 and, where $JPEFT_DATA holds it, stories260K. transformers runs with
its default cache and with a static one. Prints, per model and batch: tokens/s of each side, the ratio to the faster of
transformers' two, the bytes that a step must move (weights and cache, once each), and how fast they were moved.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _sides import Side, pin, serve, take_turns

PROMPT = 32
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 2048, "hidden_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 688,
    "max_position_embeddings": 1024,
}  # fmt: skip
SIDES = ("jpeft", "default", "static")


def timed(call: Callable[[], Any]) -> Callable[[int], list[float]]:
    """Runs `call` so many times, and gives the seconds of each."""

    def run(times: int) -> list[float]:
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds

    return run


def prompts(batch: int, vocab: int) -> Any:
    """Ids `[batch, PROMPT]`, the same for every side."""
    import numpy as np

    return np.random.default_rng(0).integers(3, vocab, (batch, PROMPT))


def prepare_jpeft(folder: str, batch: int, new: int) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """Loads the model and compiles its program."""
    pin()
    import jax

    from jpeft import models

    model = models.load(folder)
    ids = prompts(batch, model.config.vocab_size)

    def call() -> Any:
        return models.generate(model, ids, max_new_tokens=new, bucket=PROMPT).block_until_ready()

    start = time.perf_counter()
    first = call()
    compiled = time.perf_counter() - start
    cache = jax.eval_shape(lambda: model.cache(batch, PROMPT + new)).kv
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    config = json.loads((Path(folder) / "config.json").read_text())
    table = config["vocab_size"] * config["hidden_size"] if model.head else 0  # untied, of which a step reads one row
    moved += 4 * (models.num_parameters(config, "CAUSAL_LM") - table)
    return {"compile": compiled, "bytes": moved, "ids": first.tolist()}, timed(call)


def prepare_transformers(
    folder: str, batch: int, new: int, cache: str
) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """The same folder in transformers, with one of its caches."""
    cores = pin()
    import torch
    import transformers

    torch.set_num_threads(cores)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # no row ends early, on no side
    ids = torch.tensor(prompts(batch, model.config.vocab_size))
    told = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        told["cache_implementation"] = "static"

    def call() -> Any:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **told)

    first = call()[:, PROMPT:]
    return {"ids": first.tolist()}, timed(call)


def worker(side: str, case: str) -> None:
    """The child's part."""
    folder, batch, new = case.rsplit(":", 2)
    if side == "jpeft":
        serve(lambda: prepare_jpeft(folder, int(batch), int(new)))
    else:
        serve(lambda: prepare_transformers(folder, int(batch), int(new), side))


def folders(into: Path) -> dict[str, str]:
    """Model folders by name."""
    import jax

    from jpeft import models

    models.save(models.build(LLAMA, "CAUSAL_LM", key=jax.random.key(0)), into / "llama")
    found = {"Llama 4 x 256": str(into / "llama")}
    stories = Path(os.environ.get("JPEFT_DATA", "../shared/data")) / "models" / "stories260K"
    return found | ({"stories260K": str(stories)} if stories.is_dir() else {})


def measure(folder: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One model and batch: tokens/s by side, and what belongs to them."""
    case = f"{folder}:{batch}:{options.new}"
    sides = [Side(__file__, name, case, options.core_ids) for name in SIDES]
    try:
        found = take_turns(sides, options.steps, options.repeats)
    finally:
        for side in sides:
            side.close()
    rate = {name: batch * options.new / found[name]["seconds"] for name in SIDES}
    ours, *theirs = (side.start["ids"] for side in sides)
    equal = sum(a == b for x, y in zip(ours, theirs[0], strict=True) for a, b in zip(x, y, strict=True))
    return {
        "rate": rate,
        "ratio": rate["jpeft"] / max(rate["default"], rate["static"]),
        "compile": sides[0].start["compile"],
        "mbytes": sides[0].start["bytes"] / 1e6,
        "gb_per_s": sides[0].start["bytes"] * options.new / found["jpeft"]["seconds"] / 1e9,
        "equal": equal / (batch * options.new),
    }


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--new", type=int, default=64, help="tokens a call")
    parser.add_argument("--steps", type=int, default=2, help="calls a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns a side")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    options.core_ids = sorted(os.sched_getaffinity(0))[: options.cores]
    results = {}
    print("| model | batch | jpeft | default cache | static cache | ratio | same ids | compile s | MB a step | GB/s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as into:
        for name, folder in folders(Path(into)).items():
            for batch in options.batches:
                row = results[f"{name}, {batch}"] = measure(folder, batch, options)
                rates = " | ".join(f"{row['rate'][side]:.0f}" for side in SIDES)
                print(
                    f"| {name} | {batch} | {rates} | {row['ratio']:.2f} | {100 * row['equal']:.0f} % | "
                    f"{row['compile']:.1f} | {row['mbytes']:.1f} | {row['gb_per_s']:.2f} |",
                    flush=True,
                )
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:4])
    else:
        main()
