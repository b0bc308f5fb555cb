# SPDX-License-Identifier: Apache-2.0
"""How a LoRA step's time and memory grow with rows, length, layers, rank, adapters and devices, one at a time.

    python benchmarks/growth.py [--repeats 5] [--quick] [--only rows rank ...] [--json FILE] [--plot FILE]

Time is the least of several steps; memory what the compiled program takes on a device (arguments and temporaries). The
exponent is the slope of the last three points on double logarithmic axes, where constant parts matter least. Beside it
stands the algorithm's own: the slope of the counted operations of the step's matrix products at the same points, and
for memory 1 (of devices, what is left on each: -1). Devices are fake ones on the same cores, so that their time is the
work of all of them together. Writes the plot, and prints the table.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BASE = {"rows": 2, "seq": 128, "layers": 4, "rank": 16, "adapters": 0, "devices": 1}
#: What varies -> its values, and what else differs from BASE meanwhile.
SWEEPS: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "rows": ((1, 2, 4, 8, 16), {}),
    "seq": ((128, 256, 512, 1024), {"rows": 1}),
    "layers": ((2, 4, 8, 16), {}),
    "rank": ((8, 64, 512), {}),
    "adapters": ((1, 2, 4, 8), {"rows": 1}),
    "devices": ((1, 2, 4, 8), {"rows": 8}),
}
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 2048, "hidden_size": 256,
    "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
#: By how much an exponent may be above the algorithm's own: what a step's time differs by between runs.
SLACK = 0.15
#: Points at the end to which a slope is fitted.
FITTED = 3


def measure(sizes: dict[str, int], repeats: int) -> dict[str, float]:
    """Seconds, bytes on a device, and operations of the products of one step."""
    import jax
    import jax.numpy as jnp
    import optax

    import jpeft
    from jpeft.train.losses import lm_sums
    from jpeft.train.planning.trace import product_flops
    from jpeft.train.step import begin, make_step

    config = CONFIG | {"num_hidden_layers": sizes["layers"]}
    base = jpeft.models.build(config, "CAUSAL_LM", key=jax.random.key(0), remat="full")
    method = jpeft.LoRA(rank=sizes["rank"], targets="all-linear")
    model = jpeft.adapt(base, method, key=jax.random.key(1))
    tx, tokens = optax.adamw(1e-4), jnp.ones((1, sizes["rows"], sizes["seq"]), jnp.int32)
    batch = {"input_ids": tokens, "attention_mask": tokens, "labels": tokens}
    if sizes["adapters"]:
        update, state, frozen = _many(model, sizes["adapters"], tx)
    else:
        if sizes["devices"] > 1:
            mesh = jpeft.mesh({"fsdp": sizes["devices"]}, jax.devices()[: sizes["devices"]])
            rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, ("data", "fsdp")))
            model, batch = jpeft.shard(model, mesh), jax.device_put(batch, rows)
        graphdef, trainable, frozen = jpeft.partition(model)
        update, state = make_step(graphdef, lm_sums, tx, groups=sizes["devices"]), begin(tx, trainable)
    flops = product_flops(update.update, state, frozen, batch, None)
    held, seconds = [state], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        held[0], metrics = update(held[0], frozen, batch, None)
        jax.block_until_ready(metrics.loss)
        seconds.append(time.perf_counter() - start)
    cost = update.cost
    assert cost is not None, "this backend tells no cost of a program"
    return {"seconds": min(seconds[1:]), "bytes": float(cost.arguments + cost.temporaries), "flops": flops}


def _many(model: Any, count: int, tx: Any) -> tuple[Any, Any, Any]:
    """The step of several adapters at once, and its arguments."""
    import jpeft
    from jpeft.train.losses import lm_sums
    from jpeft.train.many import begin_many, fix, make_step_many

    bank = jpeft.bank([model] * count)
    fixed = fix(bank, {})
    return make_step_many(bank, lm_sums, tx), begin_many(tx, bank, fixed), fixed


def slope(xs: list[int], ys: list[float]) -> float:
    """Of log y over log x, least squares over the last points."""
    from math import log

    return statistics.linear_regression([log(x) for x in xs[-FITTED:]], [log(y) for y in ys[-FITTED:]]).slope


def run(names: list[str], repeats: int, quick: bool) -> dict[str, Any]:
    """The points and exponents of each sweep; of a quick one the first, the middle and the last."""
    found: dict[str, Any] = {}
    for name in names:
        values, others = SWEEPS[name]
        values = (values[0], values[len(values) // 2], values[-1]) if quick else values
        points = [measure(BASE | others | {name: value}, repeats) for value in values]
        series = {key: [point[key] for point in points] for key in points[0]}
        slopes = {key: slope(list(values), own) for key, own in series.items()}
        found[name] = {"values": list(values), **series, "slopes": slopes}
        print(json.dumps({name: found[name]}), flush=True)
    return found


def own_slopes(name: str, slopes: dict[str, float]) -> tuple[float, float]:
    """The algorithm's exponents of time and memory."""
    return max(slopes["flops"], 0.0), -1.0 if name == "devices" else 1.0


def table(found: dict[str, Any]) -> list[str]:
    """Markdown: exponents beside the algorithm's own."""
    lines = [
        "| grows with | from | to | time | algorithm's | memory | algorithm's | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, one in found.items():
        slopes, (time_own, memory_own) = one["slopes"], own_slopes(name, one["slopes"])
        worse = [
            word
            for word, got, own in (("time", slopes["seconds"], time_own), ("memory", slopes["bytes"], memory_own))
            if got > own + SLACK
        ]
        verdict = f"**{' and '.join(worse)} worse**" if worse else "no worse"
        lines.append(
            f"| {name} | {one['values'][0]} | {one['values'][-1]} | {slopes['seconds']:.2f} | {time_own:.2f} | "
            f"{slopes['bytes']:.2f} | {memory_own:.2f} | {verdict} |"
        )
    return lines


#: Told apart in print: stroke, marker and lightness.
STYLES = [
    ("-", "o", "0.0"),
    ("--", "s", "0.0"),
    ("-.", "^", "0.3"),
    (":", "D", "0.3"),
    ("-", "x", "0.55"),
    ("--", "v", "0.55"),
]


def plot(found: dict[str, Any], file: Path) -> None:
    """Two panels, time and memory, each relative to the first point, with the exponents at the lines' names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key, title in zip(
        figure.subplots(1, 2), ("seconds", "bytes"), ("time of a step", "memory of a device"), strict=True
    ):
        for (name, one), (stroke, marker, shade) in zip(found.items(), STYLES, strict=False):
            x = [value / one["values"][0] for value in one["values"]]
            y = [value / one[key][0] for value in one[key]]
            label = f"{name} {one['values'][0]} to {one['values'][-1]}: {one['slopes'][key]:.2f}"
            axes.plot(x, y, stroke, marker=marker, color=shade, label=label, markersize=5, linewidth=1.4)
        ends = [1, max(max(one["values"]) / one["values"][0] for one in found.values())]
        axes.plot(ends, ends, color="0.8", linewidth=1, zorder=0)
        axes.text(ends[1], ends[1], " 1", color="0.5", va="center")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlabel("times the smallest size")
        axes.set_ylabel("times that of the smallest size")
        axes.set_title(title)
        axes.legend(title="what grows, and the exponent at the end", fontsize=8, title_fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main() -> None:
    """Measures, plots and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--quick", action="store_true", help="three points of each")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "growth.png")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
    found = run(options.only, options.repeats, options.quick)
    print("\n".join(table(found)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    plot(found, options.plot)


if __name__ == "__main__":
    main()
