# SPDX-License-Identifier: Apache-2.0
"""What fits where: three Llamas by four methods on five TPU slices, by shape and compiled ahead of time without a TPU.

  pip install 'jpeft[tpu-plan]'
  python benchmarks/plan_table.py --out cells.jsonl --no-compile   # all cells by shape: minutes
  python benchmarks/plan_table.py --out cells.jsonl                # compiles what is not yet compiled, a line a cell
  python benchmarks/plan_table.py --out cells.jsonl --show         # the Markdown table of docs/results/tpu.md

By shape: the most rows at each length. Compiled: one row a device of 2048 tokens, whose memory is then known both ways.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax

from jpeft.train.planning import devices, table
from jpeft.train.planning.compiling import compiled
from jpeft.train.planning.devices import GIB
from jpeft.train.planning.estimate import memory
from jpeft.train.planning.request import Request
from jpeft.train.planning.subject import subject

MODELS = ("llama-2-7b", "llama-3-8b", "llama-3-70b")
_LORA = {"kind": "lora", "rank": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
METHODS = {
    "LoRA": (_LORA, None),
    "QLoRA": (_LORA, "nf4"),
    "prefix": ({"kind": "prefix_tuning", "num_tokens": 32}, None),
    "full": ({"kind": "full"}, None),
}
SLICES = ("v5e-8", "v5p-8", "v6e-8", "v5p-64", "v5e-256")
LENGTHS = (512, 2048, 4096)
COMPILED = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of cells")
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--no-compile", action="store_true", help="by shape alone")
    options = parser.parse_args()
    known = {}
    if options.out.exists():
        known = {entry["cell"]: entry for entry in map(json.loads, options.out.read_text().splitlines())}
    if options.show:
        print(shown([known[name] for name in cells() if name in known]))
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # the compiler for TPUs cannot read it back
    for name in cells():
        entry = known.get(name, {"cell": name, "rows": None})
        if options.only not in name or ("by_shape" in entry and (options.no_compile or "compiled" in entry)):
            continue
        entry = measured(entry, compiling=not options.no_compile)
        with options.out.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)


def cells() -> list[str]:
    """Their names, in the order of the table."""
    return [f"{model} {method} {name}" for model in MODELS for method in METHODS for name in SLICES]


def measured(entry: dict[str, Any], *, compiling: bool) -> dict[str, Any]:
    """A cell with what it lacks."""
    model, method, name = entry["cell"].split()
    options, scheme = METHODS[method]
    request = Request(model, options, devices.topology(name), remat="full", quantize=scheme)
    rows = entry["rows"] or {str(length): n for length, n in table.most_rows(request, LENGTHS).items()}
    asked = request.but(batch=table.rows_at_least(request), seq=COMPILED)
    entry = {**entry, "rows": rows, "batch": asked.batch, "by_shape": memory(subject(asked)).total / GIB}
    if compiling:
        program = compiled(asked, effort="O0", read=False)
        entry |= {"compiled": program.total / GIB, "fits": program.needed is None, "seconds": program.seconds}
    return entry


def shown(entries: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "| model | method | slice | rows of 512 | of 2048 | of 4096 | step of | GiB by shape | GiB compiled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        rows = [f"{n:,}" if n else "none" for n in entry["rows"].values()]
        step = ["", "", "not compiled"]
        if "compiled" in entry:
            figure = f"{entry['compiled']:.2f}" + ("" if entry["fits"] else " (refused)")
            step = [f"{entry['batch']} x {COMPILED}", f"{entry['by_shape']:.2f}", figure]
        lines.append("| " + " | ".join([*entry["cell"].split(), *rows, *step]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
