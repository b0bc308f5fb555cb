# SPDX-License-Identifier: Apache-2.0
"""A LoRA train step on a quantized base beside the same on floats, in turns in one process.

    python benchmarks/quantized.py [--schemes nf4 nf4_double int8] [--repeats 7] [--json FILE]

A Llama of 4 layers, d=512, 4 rows of 256 tokens, LoRA of rank 8 on all projections, AdamW. Prints each median, its
rate against the float base's (0.8 is asked for), its loss, and the bytes of the base's leaves.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft.train.losses import SUMS
from jpeft.train.step import begin, make_step

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8000, "hidden_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1408,
    "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
ROWS, SEQ = 4, 256


def prepare(scheme: str | None) -> tuple[Callable[[], float], int]:
    """A function that takes one step and returns its loss, and the bytes of the base."""
    base = jpeft.models.build(LLAMA, key=jax.random.key(0))
    base = base if scheme is None else jpeft.quantize(base, scheme)
    model = jpeft.adapt(base, jpeft.LoRA(rank=8, alpha=16, targets="all-linear"), key=jax.random.key(1))
    graphdef, trainable, frozen = jpeft.partition(model)
    tx = jpeft.optimizer(optax.adamw(1e-4), model=graphdef)
    update, held = make_step(graphdef, SUMS["CAUSAL_LM"], tx), [begin(tx, trainable)]
    ids = np.random.default_rng(0).integers(0, 8000, (1, ROWS, SEQ), dtype=np.int32)
    batch = {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(ids), "attention_mask": jnp.ones_like(ids)}

    def step() -> float:
        held[0], metrics = update(held[0], frozen, batch, None)
        return float(metrics.loss)

    return step, sum(leaf.nbytes for leaf in frozen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["nf4", "nf4_double", "fp4", "int8"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    sides = {name: prepare(None if name == "float32" else name) for name in ("float32", *options.schemes)}
    losses = {name: step() for name, (step, _) in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, (step, _) in sides.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    found: dict[str, dict[str, Any]] = {}
    print("| base | ms a step | rate against float32 | first loss | MB |\n|---|---:|---:|---:|---:|")
    for name, (_, size) in sides.items():
        ratios = [a / b for a, b in zip(times["float32"], times[name], strict=True)]
        found[name] = {"ms": 1000 * statistics.median(times[name]), "rate": statistics.median(ratios), "bytes": size}
        row = found[name]
        print(f"| {name} | {row['ms']:.0f} | {row['rate']:.2f} | {losses[name]:.4f} | {size / 1e6:.1f} |")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
