# SPDX-License-Identifier: Apache-2.0
"""Writes what `jpeft advise` may cite from the results in docs/results/data.

    python benchmarks/evidence.py            # writes jpeft/train/advising/evidence.json

Each fact is a sentence whose figures come from one result file, and the page that tells how they were measured. A test
holds the file to what this writes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA, OUT = ROOT / "docs" / "results" / "data", ROOT / "jpeft" / "train" / "advising" / "evidence.json"

#: Kinds of methods by their names in the studies and benchmarks.
KINDS = {
    "prefix": "prefix_tuning", "prompt": "prompt_tuning", "p-tuning": "p_tuning", "norms": "norm_tuning",
    "tokens": "trainable_tokens", "last layer": "last_layers", "parallel": "parallel_adapter",
}  # fmt: skip


def facts(data: Path = DATA) -> dict[str, dict[str, str]]:
    """Every fact by its name."""
    found = dict(_steps(data / "methods.json"))
    for file in sorted(data.glob("*.json")):
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and "tables" in values:
            found |= dict(_study(file.stem, values))
    return found


def _steps(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """How long a step of every method takes."""
    for kind, row in json.loads(file.read_text(encoding="utf-8")).items():
        said = f"a step of MiniLM takes {row['of_lora']:.2f} of a LoRA step's time"
        yield f"step/{KINDS.get(kind, kind)}", _fact(said, "docs/results/speed.md")


def _study(name: str, values: dict[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """What a comparison found of every method, and how many collapsed."""
    page = f"docs/results/{name.removesuffix('_untuned')}.md"
    for table in values["tables"]:
        where = f"{table['task']} with {table['model']}" + (", as published" if name.endswith("_untuned") else "")
        rows = [row for row in table["rows"] if row["method"] != "majority"]
        fallen, trained = (sum(row[key] for row in rows) for key in ("collapsed", "seeds"))
        if fallen:
            said = f"{where}: {fallen} of {trained} trainings predicted one class for everything"
            yield f"collapse/{name}", _fact(said, page)
        for row in rows:
            kind = KINDS.get(row["method"], row["method"])
            main = row["scores"].get(table["main"])
            if main and not row["collapsed"] and not row["diverged"]:
                said = f"{where}: {table['main']} {main[0]:.3f} [{main[1]:.3f}, {main[2]:.3f}]"
                yield f"score/{name}/{table['task']}/{kind}", _fact(said, page)
            before, after = row["costs"].get("forward ms"), row["costs"].get("merged ms")
            if before and after:
                said = f"{where}: a forward pass of {before:.1f} ms, and {after:.1f} ms merged"
                yield f"latency/{name}/{table['task']}/{kind}", _fact(said, page)


def _fact(said: str, page: str) -> dict[str, str]:
    return {"said": said, "page": page}


def text() -> str:
    """The file."""
    return json.dumps(facts(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
    print(f"{len(facts())} facts in {OUT.relative_to(ROOT)}")
