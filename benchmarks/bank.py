# SPDX-License-Identifier: Apache-2.0
"""A batch in which every row has its own LoRA against the same batch with one LoRA for all, forward and train step.

    python benchmarks/bank.py [--rows 32] [--seq 64] [--repeats 15] [--model minilm]

Prints the best time of each, taken in turns, their ratio, and what the compiled programs hold: a mixed batch must not
copy the base's weights, nor multiply by them row by row.
"""

import argparse
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jpeft
from jpeft.train.step import CPU_OPTIONS

#: name -> (width, layers)
MODELS = {"tiny": (128, 2), "minilm": (384, 6), "bert": (768, 12)}
RANK = 8


def build(model: str) -> Any:
    """A random BERT of these sizes with a head for two classes."""
    width, layers = MODELS[model]
    config = {
        "model_type": "bert", "vocab_size": 1000, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": width // 32, "intermediate_size": 4 * width, "max_position_embeddings": 512,
        "num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return jpeft.models.build(config, "SEQ_CLS", key=jax.random.key(0))


def make_bank(base: Any, rows: int) -> jpeft.Bank:
    """`rows` LoRAs of several ranks and alphas, with noise in every leaf."""
    models = []
    for i in range(rows):
        method = jpeft.LoRA(rank=RANK, alpha=4 + i, targets=["query", "value"], modules_to_save=())
        graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(base, method, key=jax.random.key(i)))
        trainable = {p: v + 0.02 * jax.random.normal(jax.random.key(i), v.shape) for p, v in trainable.items()}
        models.append(jpeft.combine(graphdef, trainable, frozen))
    return jpeft.bank(models)


def programs(
    bank: jpeft.Bank, ids: jax.Array, tokens: jax.Array
) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """name -> (one adapter for all rows, another one for every row): functions of the bank's trainable leaves."""
    graphdef, own, frozen = jpeft.partition(bank.model(1))

    def alone(trainable: Any) -> jax.Array:
        return jpeft.combine(graphdef, trainable, frozen)(tokens)

    def mixed(trainable: Any) -> jax.Array:
        return jpeft.apply_bank(bank.with_trainable(trainable), ids, lambda model, row: model(row), tokens)

    def slope(function: Callable[..., jax.Array]) -> Callable[..., Any]:
        return jax.grad(lambda trainable: (function(trainable) ** 2).sum())

    both = {"forward": (alone, mixed), "gradient": (slope(alone), slope(mixed))}
    options: Any = CPU_OPTIONS if jax.default_backend() == "cpu" else None
    return {
        name: (
            jax.jit(one).lower(own).compile(compiler_options=options),
            jax.jit(many).lower(bank.trainable).compile(compiler_options=options),
        )
        for name, (one, many) in both.items()
    }  # fmt: skip


def best(functions: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds of each, the best of several, taken in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            own.append(time.perf_counter() - start)
    return [min(own[1:]) for own in times]


def copies(program: Any, rows: int, width: int) -> list[str]:
    """Arrays of the compiled program that hold a base kernel once for every row."""
    shapes = {f"[{rows},{a},{b}]" for a in (width, 4 * width) for b in (width, 4 * width)}
    return sorted({found for found in re.findall(r"f32(\[[\d,]+\])", program.as_text()) if found in shapes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    args = parser.parse_args()
    bank = make_bank(build(args.model), args.rows)
    tokens = jax.random.randint(jax.random.key(1), (args.rows, args.seq), 0, 1000)
    made = programs(bank, jnp.arange(args.rows) + 1, tokens)
    own = jpeft.partition(bank.model(1))[1]
    print(f"{args.model}, {args.rows} rows of {args.seq} tokens, each with a LoRA of rank {RANK}, {jax.devices()[0]}")
    for name, (one, many) in made.items():
        alone, mixed = best([lambda one=one: one(own), lambda many=many: many(bank.trainable)], args.repeats)
        found = copies(many, args.rows, MODELS[args.model][0])
        print(f"{name:<10} one {1e3 * alone:7.1f} ms   mixed {1e3 * mixed:7.1f} ms   ratio {mixed / alone:.3f}   "
              f"base kernels copied per row: {', '.join(found) or 'none'}")  # fmt: skip


if __name__ == "__main__":
    main()
