# SPDX-License-Identifier: Apache-2.0
"""Writes what was measured of every method into its page, from docs/results/data.

    python benchmarks/method_pages.py        # docs/lora.md and docs/methods/*.md, between the lines below

  <!-- measured | houlsby, pfeiffer -->      a row for each of these names of the studies and benchmarks
  <!-- end -->

A test holds the pages to what this writes.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "docs" / "results" / "data"
PAGES = [ROOT / "docs" / "lora.md", *sorted((ROOT / "docs" / "methods").glob("*.md"))]
_BLOCK = re.compile(r"(<!-- measured \| ([^>]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
#: Names of the studies, by those of benchmarks/methods.py where they differ.
STUDIED = {
    "norm_tuning": "norms",
    "trainable_tokens": "tokens",
    "prompt_tuning": "prompt",
    "p_tuning": "p-tuning",
    "prefix_tuning": "prefix",
    "last_layers": "last layer",
}
HEAD = ("", "trained", "perplexity [95 %]", "less LoRA's [95 %]", "forgets", "step of LoRA's time", "x PEFT's rate")


def main() -> None:
    """Writes all pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := written(text, page)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"written: {page}")


def written(text: str, page: Path) -> str:
    """A page with its figures as they are in the data."""
    return _BLOCK.sub(lambda m: m[1] + "\n" + block(m[2].split(", "), page) + "\n\n" + m[4], text)


def block(names: list[str], page: Path) -> str:
    """The rows of `names`, and where they come from."""
    study, steps = _study("stories"), [_data(f"methods_{shape}") for shape in ("bert", "llama")]
    lines = [list(HEAD), [":--", *["--:"] * (len(HEAD) - 1)], *(row(name, study, steps) for name in names)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    known = {name: study[name]["scores"]["perplexity"][0] for name in ("untuned", "lora", "full")}
    where = "results" if page.parent.name == "docs" else "../results"
    return (
        f"{table}\n\nTrained, perplexity, forgetting: a trained Llama of 260,032 weights learns Shakespeare, at a "
        f"rate of its own\nfor each ([study]({where}/stories.md)); untuned {known['untuned']:.1f}, LoRA "
        f"{known['lora']:.1f}, all weights {known['full']:.1f}; forgotten are nats per token of its stories. Steps:\n"
        f"BERT-base, and a Llama of 12 layers ([costs]({where}/efficiency.md))."
    )


def row(name: str, study: dict[str, Any], steps: list[dict[str, Any]]) -> list[str]:
    """The cells of one name; `-` where nothing was measured."""
    found, cells = study.get(STUDIED.get(name, name)), ["-"] * 4
    if found is not None:
        costs, (mean, *interval) = found["costs"], found["scores"]["perplexity"]
        forgets = costs["general loss after"] - costs["general loss before"]
        apart = found["apart"] and found["apart"][0]
        less = f"{apart[0]:+.2f} [{apart[1]:+.2f}, {apart[2]:+.2f}]" if apart else "-"
        spread = f"{mean:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"
        cells = [f"{costs['trained']:,.0f}", spread, less, f"{forgets:+.2f}"]
    rates = [[shape[name][key] if name in shape else None for shape in steps] for key in ("of_lora", "of_peft")]
    return [name.replace("_", " "), *cells, *(_both(pair) for pair in rates)]


def _both(pair: list[float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.2f}" for value in pair) if any(pair) else "-"


def _study(name: str) -> dict[str, Any]:
    (table,) = _data(name)["tables"]
    return {row["method"]: row for row in table["rows"]}


def _data(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
