# SPDX-License-Identifier: Apache-2.0
"""What fits where: three Llamas by four methods on five TPU slices, by shape and compiled ahead of time without a TPU.

pip install 'jpeft[tpu-plan]'
python benchmarks/plan_table.py --out cells.jsonl        # a line a cell, once it is known; goes on where it was
python benchmarks/plan_table.py --out cells.jsonl --show # the Markdown table of docs/results/tpu.md
"""

import argparse
import json
from pathlib import Path

import jax

from jpeft.train.planning import devices, table
from jpeft.train.planning.request import Request

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of cells")
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--no-compile", action="store_true", help="by shape alone")
    options = parser.parse_args()
    known = [json.loads(text) for text in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.show:
        print(shown(known))
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # the compiler for TPUs cannot read it back
    done = {entry["cell"] for entry in known if options.no_compile or "not compiled" not in entry["line"]}
    for model in MODELS:
        for method in METHODS:
            for name in SLICES:
                cell = f"{model} {method} {name}"
                if cell not in done and options.only in cell:
                    entry = measured(model, method, name, compiling=not options.no_compile)
                    with options.out.open("a") as file:
                        file.write(json.dumps({"cell": cell, "line": entry}) + "\n")
                    print(cell, "|", entry, flush=True)


def measured(model: str, method: str, name: str, *, compiling: bool) -> str:
    """One cell, as a row of the table without its first columns."""
    options, scheme = METHODS[method]
    request = Request(model, options, devices.topology(name), remat="full", quantize=scheme)
    return table.line(table.cell(request, LENGTHS, at=2048, compiling=compiling))


def shown(known: list[dict[str, str]]) -> str:
    """The table in Markdown."""
    lines = [
        "| model | method | slice | rows at 512 | at 2048 | at 4096 | compiled | by shape, GiB | compiled, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    last: dict[str, str] = {}
    for entry in known:  # a cell that was compiled stands behind the same by shape
        if "not compiled" not in entry["line"] or entry["cell"] not in last:
            last[entry["cell"]] = entry["line"]
    return "\n".join(lines + [f"| {' | '.join(cell.split())} | {line}" for cell, line in last.items()])


if __name__ == "__main__":
    main()
