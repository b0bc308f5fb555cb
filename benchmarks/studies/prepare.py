# SPDX-License-Identifier: Apache-2.0
"""Writes the rows of the studies beside this file: `python benchmarks/studies/prepare.py [DATA] [OUT]`.

  pubmedqa/{train,dev,test}.jsonl    text and label; the official split: folds 0 and 1 of the 500 training questions are
                                     the dev split, the 500 test questions stay. A text is the question and then the
                                     abstract from its last part to its first, so that a cut leaves out the background
                                     and not the results; the long answer is never in it
  sentiment/{train,dev,test}.jsonl   text, label and source; 6,520 and 400 sentences of SST-2 to train and to choose on;
                                     tested on SST-2's validation split and on every fifth of 2,000 reviews of IMDB
  stories/{train,dev,test}.jsonl     tinyshakespeare in order, 80, 10 and 10 % of its paragraphs; general.jsonl: 200
                                     texts of TinyStories

DATA is by default $JPEFT_DATA, or ../shared/data; OUT is runs/study_data.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

_SENTIMENTS = ("negative", "positive")


def main(data: Path, out: Path) -> None:
    """Reads the data sets under `data`, and writes all tasks under `out`."""
    for task in (pubmedqa, sentiment, stories):
        for name, rows in task(data).items():
            write(out / task.__name__ / f"{name}.jsonl", rows)


def pubmedqa(data: Path) -> dict[str, list[dict[str, str]]]:
    """Questions with their abstracts, and yes, no or maybe."""
    rows, tests = (read(data / "pubmedqa" / f"{name}.jsonl") for name in ("train_cv", "test"))
    train, dev = ([r for r in rows if (r["cv_fold"] < 2) == chosen] for chosen in (False, True))
    return {
        name: [{"text": " ".join([r["question"], *r["contexts"][::-1]]), "label": r["final_decision"]} for r in found]
        for name, found in {"train": train, "dev": dev, "test": tests}.items()
    }


def sentiment(data: Path) -> dict[str, list[dict[str, str]]]:
    """Sentences and reviews of films, with their source."""
    sentences = _films(read(data / "sst2" / "train_sentences.jsonl"), "sentence", "sst2")
    random.Random(0).shuffle(sentences)
    near = _films(read(data / "sst2" / "validation.jsonl"), "sentence", "sst2")
    far = _films(read(data / "imdb" / "test_2k.jsonl")[::5], "text", "imdb")
    return {"train": sentences[:-400], "dev": sentences[-400:], "test": near + far}


def _films(rows: list[dict[str, Any]], column: str, source: str) -> list[dict[str, str]]:
    return [
        {"text": r[column].replace("<br />", " "), "label": _SENTIMENTS[r["label"]], "source": source} for r in rows
    ]


def stories(data: Path) -> dict[str, list[dict[str, str]]]:
    """Paragraphs of Shakespeare, and stories for children."""
    text = (data / "text" / "tinyshakespeare.txt").read_text().split("\n\n")
    cuts = [0, len(text) * 8 // 10, len(text) * 9 // 10, len(text)]
    parts = {n: text[a:b] for n, a, b in zip(("train", "dev", "test"), cuts, cuts[1:], strict=False)}
    found = {name: [{"text": paragraph} for paragraph in part] for name, part in parts.items()}
    return found | {"general": read(data / "text" / "tinystories_2mb.jsonl")[:200]}


def read(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, one a line; a text may hold other line ends than this."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{file}: {len(rows):,} rows")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    default = Path(os.environ.get("JPEFT_DATA", Path(__file__).parents[3] / "shared" / "data"))
    main(*(given + [default, Path("runs/study_data")][len(given) :]))
