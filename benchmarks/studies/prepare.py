# SPDX-License-Identifier: Apache-2.0
"""Writes the rows of the studies beside this file: `python benchmarks/studies/prepare.py [DATA] [OUT]`.

  pubmedqa/{train,dev,test}.jsonl   text (question and abstract, without the long answer) and label; the official split:
                                    fold 0 of the 500 training questions is the dev split, the 500 test questions stay
  stories/{train,dev,test}.jsonl    tinyshakespeare in order, 80, 10 and 10 % of its paragraphs; general.jsonl: 200
                                    texts of TinyStories

DATA is by default $JPEFT_DATA, or ../shared/data; OUT is runs/study_data.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(data: Path, out: Path) -> None:
    """Reads the data sets under `data`, and writes both tasks under `out`."""
    (out / "pubmedqa").mkdir(parents=True, exist_ok=True)
    rows, tests = (read(data / "pubmedqa" / f"{name}.jsonl") for name in ("train_cv", "test"))
    parts = {"train": [r for r in rows if r["cv_fold"]], "dev": [r for r in rows if not r["cv_fold"]], "test": tests}
    for name, found in parts.items():
        lines = [{"text": " ".join([r["question"], *r["contexts"]]), "label": r["final_decision"]} for r in found]
        write(out / "pubmedqa" / f"{name}.jsonl", lines)
    (out / "stories").mkdir(exist_ok=True)
    text = (data / "text" / "tinyshakespeare.txt").read_text().split("\n\n")
    cuts = [0, len(text) * 8 // 10, len(text) * 9 // 10, len(text)]
    for name, first, last in zip(("train", "dev", "test"), cuts, cuts[1:], strict=False):
        write(out / "stories" / f"{name}.jsonl", [{"text": paragraph} for paragraph in text[first:last]])
    write(out / "stories" / "general.jsonl", read(data / "text" / "tinystories_2mb.jsonl")[:200])


def read(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, one a line; a text may hold other line ends than this."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{file}: {len(rows):,} rows")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    default = Path(os.environ.get("JPEFT_DATA", Path(__file__).parents[3] / "shared" / "data"))
    main(*(given + [default, Path("runs/study_data")][len(given) :]))
