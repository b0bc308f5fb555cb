# SPDX-License-Identifier: Apache-2.0
"""What starts cost: importing, compiling deep models, and starting again from the persistent cache.

    python benchmarks/startup.py [--repeats 5] [--json FILE]

  import    jax and flax, against the same with jpeft and what a training uses of it, each in a process of its own
  depth     a LoRA step of a Llama of 4 and 32, 8 and 80 layers, by shape: trace, lower, compile, without any cache
  again     a process from its start to the end of the first update of a Llama of 12 layers, d=768, with an empty
            compilation cache and with the full one

Medians of runs in turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

FOUNDATION = "import jax, flax.nnx, optax; jax.numpy.zeros(1)"
TRAINING = "import jpeft; jpeft.adapt, jpeft.LoRA, jpeft.models.build, jpeft.quantize; import jpeft.train.step"
IMPORTS = {
    "jax + flax": FOUNDATION,
    "and jpeft": f"{FOUNDATION}; import jpeft",
    "and what a training uses": f"{FOUNDATION}; {TRAINING}",
}
#: Layers of which the second costs at most so many times the first to compile.
DEPTHS = {(4, 32): 1.5, (8, 80): 2.0}
MOST_IMPORT, MOST_AGAIN = 0.3, 10.0

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "num_attention_heads": 12,
    "num_key_value_heads": 12, "max_position_embeddings": 2048,
}  # fmt: skip
DEEP = CONFIG | {"hidden_size": 384, "intermediate_size": 1024}
FIRST = CONFIG | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}


def process(code: str, **variables: str) -> tuple[float, str]:
    """Seconds that a Python process with this code takes from start to end, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu", **variables}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return time.perf_counter() - start, done.stdout


def in_turns(calls: dict[Any, Callable[[], float]], repeats: int) -> dict[Any, float]:
    """The median of each call's figures, taken in turns, after a round that does not count."""
    found: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            found[name].append(call())
    return {name: statistics.median(own[1:]) for name, own in found.items()}


def imports(repeats: int) -> dict[str, float]:
    """Seconds of a process that imports and ends."""
    return in_turns({name: lambda code=code: process(code)[0] for name, code in IMPORTS.items()}, repeats)


def step_of(config: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """A LoRA step, not compiled, and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import jpeft
    from jpeft.train.losses import lm_sums
    from jpeft.train.step import begin_shapes, make_step

    key = jax.random.key(0)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def make() -> Any:
        model = jpeft.models.build(config, "CAUSAL_LM", key=key)
        return jpeft.adapt(model, jpeft.LoRA(rank=16, targets="all-linear"), key=key)

    graphdef, *halves = jpeft.partition(nnx.eval_shape(make))
    trainable, frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), halves)
    tx = optax.adamw(1e-4)
    row = jax.ShapeDtypeStruct((1, 2, 256), jnp.int32, sharding=here)
    batch = dict.fromkeys(("input_ids", "attention_mask", "labels"), row)
    return make_step(graphdef, lm_sums, tx), (begin_shapes(tx, trainable), frozen, batch, None)


def compile_seconds(layers: int) -> float:
    """Seconds from a config to a program, nothing kept from before."""
    import jax

    jax.clear_caches()
    start = time.perf_counter()
    update, arguments = step_of(DEEP | {"num_hidden_layers": layers})
    update.compiled(*arguments)
    return time.perf_counter() - start


def depth(repeats: int) -> dict[int, float]:
    """Seconds to compile by layers."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    layers = sorted({one for pair in DEPTHS for one in pair})
    return in_turns({one: lambda one=one: compile_seconds(one) for one in layers}, repeats)


FIRST_UPDATE = f"""
import jax, jax.numpy as jnp, optax, jpeft
from jpeft.train.losses import lm_sums
from jpeft.train.step import begin, make_step
model = jpeft.models.build({FIRST!r}, "CAUSAL_LM", key=jax.random.key(0))
model = jpeft.adapt(model, jpeft.LoRA(rank=16, targets="all-linear"), key=jax.random.key(1))
graphdef, trainable, frozen = jpeft.partition(model)
tx = optax.adamw(1e-4)
update = make_step(graphdef, lm_sums, tx)
row = jnp.ones((1, 1, 128), jnp.int32)
batch = dict(input_ids=row, attention_mask=row, labels=row)
update(begin(tx, trainable), frozen, batch, None)[1].loss.block_until_ready()
print(update.compile_seconds)
"""


def again(repeats: int) -> dict[str, float]:
    """Seconds to the first update: with an empty cache once, with the full one the median."""
    with tempfile.TemporaryDirectory() as cache:
        variables = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        first, _ = process(FIRST_UPDATE, **variables)
        later = [process(FIRST_UPDATE, **variables)[0] for _ in range(repeats)]
    return {"empty": first, "full": statistics.median(later)}


def report(found: dict[str, Any]) -> list[str]:
    """A line for each figure and its bar."""
    alone = found["import"]["jax + flax"]
    lines = [f"| import {name} | {seconds:.2f} s | |" for name, seconds in found["import"].items()]
    more = found["import"]["and jpeft"] - alone
    lines.append(f"| what `import jpeft` adds | {more:.2f} s | at most {MOST_IMPORT} s |")
    lines.append(f"| what a training's imports add | {found['import']['and what a training uses'] - alone:.2f} s | |")
    for (few, many), most in DEPTHS.items():
        ratio = found["depth"][many] / found["depth"][few]
        times = f"{found['depth'][few]:.1f} and {found['depth'][many]:.1f} s"
        lines.append(f"| compiling {few} and {many} layers | {times}: {ratio:.2f} | at most {most} |")
    lines.append(f"| first update, empty cache | {found['again']['empty']:.1f} s | |")
    lines.append(f"| first update, full cache | {found['again']['full']:.1f} s | at most {MOST_AGAIN:g} s |")
    return ["| what | measured | asked |", "|---|---:|---:|", *lines]


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    found = {"import": imports(options.repeats), "depth": depth(options.repeats), "again": again(options.repeats)}
    print("\n".join(report(found)))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
