# SPDX-License-Identifier: Apache-2.0
"""Every method of jpeft on every family of the zoo, held against the real peft in both directions.

  make conformance        measures all cells, writes docs/conformance.md, and fails where one is above the limit

A cell is the largest difference of a logit at a token, over rows padded on either side, or the words of the error with
which one of the two refuses. Nothing in the page is written by hand: methods are `jpeft.METHODS`, families the zoo's.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import peft_oracle as oracle
import torch

import jpeft
from jpeft.models._families import FAMILIES

PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"
#: float32 against float32 at unit scale, through three layers.
LIMIT = 1e-5
#: The tables of the page, and what stands in them.
TABLES = {"From jpeft to peft": "exported", "From peft to jpeft": "imported", "There and back": "again"}
PACKAGES = ("jpeft", "jax", "flax", "peft", "transformers", "torch", "numpy")

#: Methods with targets of their own.
ON_MATRICES = ("lora", "dora", "adalora", "loha", "lokr", "vera", "oft", "fourierft")
#: Adapters that a method is put on top of.
BELOW = {"adapter_fusion": ("one", "other")}
#: Options of methods that have none to start with, or whose defaults PEFT has no form for.
OPTIONS: dict[str, dict[str, Any]] = {
    "adapter_fusion": {"adapters": BELOW["adapter_fusion"]},
    "last_layers": {"n": 1},
    "adalora": {"init_rank": 4, "target_rank": 2, "total_steps": 20},
    "oft": {"block_size": 4},
    "fourierft": {"n_frequency": 40, "scaling": 9.0},
    "compacter": {"reduction_factor": 4},
    "prefix_tuning": {"num_tokens": 3, "shift_positions": True},
    "prompt_tuning": {"num_tokens": 3},
    "p_tuning": {"num_tokens": 3},
    "trainable_tokens": {"token_indices": sorted({3, *oracle.IDS[:, 2].tolist()} - {0}), "modules_to_save": ()},
}
#: Where methods sit on a model that has no defaults for them, as it has none in peft.
PLACES: dict[tuple[str, str], dict[str, Any]] = {
    ("ia3", "distilbert"): {"targets": ("k_lin", "v_lin", "lin2"), "feedforward": ("lin2",)},
    ("ia3", "mixtral"): {"targets": ("k_proj", "v_proj"), "feedforward": ()},
    ("ia3", "phi3"): {"targets": ("qkv_proj", "down_proj"), "feedforward": ("down_proj",)},
    ("ia3", "xlm-roberta tokens"): {"targets": ("key", "value", "output.dense"), "feedforward": ("output.dense",)},
    ("ia3", "vit"): {"targets": ("k_proj", "v_proj", "fc2"), "feedforward": ("fc2",)},
    ("ia3", "whisper"): {"targets": ("k_proj", "v_proj", "fc2"), "feedforward": ("fc2",)},
    **{(kind, name): {"targets": ("q_proj", "v_proj", "fc1")} for kind in ON_MATRICES for name in ("vit", "whisper")},
    **{(kind, "phi3"): {"targets": ("qkv_proj", "o_proj")} for kind in ON_MATRICES},
}
#: The rows that are compared, where not all are: to a prompt PEFT's RoBERTa is given embeddings, of which it counts
#: padding as well, so that a row padded on the left is another text there.
ROWS = {
    (kind, family): [0, 2] for kind in ("prompt_tuning", "p_tuning") for family in ("roberta cls", "xlm-roberta tokens")
}
#: What peft trains where our own file describes another thing, or there is none.
CONFIGS: dict[str, Callable[..., Any]] = {
    "p_tuning": lambda **sizes: peft.PromptEncoderConfig(num_virtual_tokens=3, **sizes),
    "prefix_tuning": lambda **sizes: peft.PrefixTuningConfig(num_virtual_tokens=3, **sizes),
}
#: Of what peft starts so near to nothing that three steps change no logit by a thousandth.
NOISE = {"adalora": 0.2}
#: What peft must be told of the models whose sizes it does not find out.
SIZES = {
    "distilbert": {"token_dim": 16, "num_attention_heads": 4, "num_layers": 3},
    "t5 prefix_tuning": {"token_dim": 24},
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What came of one method on one family; a difference, or why there is none.

    Attributes:
      exported: peft's logits from our files against ours.
      imported: ours from peft's files, after a few steps of training there, against peft's.
      again: bytes in which our files differ when they are read and written once more.
    """

    exported: float | str
    imported: float | str
    again: int | str


def families() -> dict[str, str]:
    """For every model type of the zoo, the first of the oracle's models of that type."""
    return {kind: next(name for name, (own, *_) in oracle.FAMILIES.items() if own == kind) for kind in FAMILIES}


def measure(kind: str, family: str) -> Cell:
    """One method on one of the oracle's models."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs, back = (Path(folder) / name for name in ("ours", "theirs", "back"))
        exported = _or_reason(lambda: _export(kind, family, ours))
        again = _or_reason(lambda: _again(family, ours, back)) if ours.exists() else exported
        if kind not in CONFIGS and not ours.exists():
            return Cell(exported, exported, again)  # there is nothing to tell peft
        return Cell(exported, _or_reason(lambda: _import(kind, family, ours, theirs)), again)


def _export(kind: str, family: str, folder: Path) -> float:
    model, key = oracle.jax_model(family), jax.random.key(0)
    for name in BELOW.get(kind, ()):
        model = jpeft.adapt(model, jpeft.Pfeiffer(), key=key, name=name)
    model = jpeft.adapt(model, jpeft.METHODS[kind](**OPTIONS.get(kind, {}), **PLACES.get((kind, family), {})), key=key)
    graphdef, trainable, frozen = jpeft.partition(model)
    rng = np.random.default_rng(3)
    moved = {path: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in trainable.items()}
    model = jpeft.combine(graphdef, moved, frozen)
    jpeft.export_peft(model, folder, name=kind)
    base = oracle.torch_model(family)
    real = _of_peft(lambda: peft.PeftModel.from_pretrained(base, folder))
    return _difference(model, real.eval(), kind, family)


def _import(kind: str, family: str, ours: Path, folder: Path) -> float:
    """Of an adapter that peft trained by its own configuration or, where none is given, by that of our file."""
    if kind in CONFIGS:
        config = CONFIGS[kind](**SIZES.get(family, SIZES.get(f"{family} {kind}", {})))
    else:
        config = peft.PeftConfig.from_pretrained(str(ours))
    config.inference_mode = False
    real = _of_peft(lambda: oracle.train_real(family, config, folder, noise=NOISE.get(kind, 0.0)))
    return _difference(jpeft.import_peft(oracle.jax_model(family), folder), real, kind, family)


def _of_peft(make: Callable[[], Any]) -> Any:
    """What `make` gives, where an error is peft's own."""
    try:
        return make()
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"peft itself: {type(error).__name__}: {error}") from error


def _again(family: str, ours: Path, back: Path) -> int:
    jpeft.export_peft(jpeft.import_peft(oracle.jax_model(family), ours), back)
    pairs = [
        [(folder / file).read_bytes() for folder in (ours, back)]
        for file in ("adapter_config.json", "adapter_model.safetensors")
    ]
    return sum(sum(x != y for x, y in zip(*pair, strict=False)) + abs(len(pair[0]) - len(pair[1])) for pair in pairs)


def _difference(model: Any, real: Any, kind: str, family: str) -> float:
    rows = ROWS.get((kind, family), [0, 1, 2])

    def seen(outputs: np.ndarray) -> np.ndarray:
        return outputs[rows][oracle.MASK[rows] == 1] if outputs.ndim == 3 else outputs[rows]

    graphdef, trainable, frozen = jpeft.partition(model)
    got = jax.jit(lambda *leaves: oracle.jax_outputs(jpeft.combine(graphdef, *leaves)))(trainable, frozen)
    with torch.no_grad():
        expected = oracle.torch_outputs(real, oracle.FAMILIES[family][1]).numpy()
        base = oracle.torch_outputs(oracle.torch_model(family), oracle.FAMILIES[family][1]).numpy()
    if not np.abs(seen(expected) - seen(base)).max() > 1e-3:
        raise AssertionError(f"the adapter does nothing on {family}, so that equal logits prove nothing")
    return float(np.abs(seen(np.array(got)) - seen(expected)).max())


def _or_reason(make: Callable[[], Any]) -> Any:
    """What `make` gives, or why it refuses; a folder's name in the words would differ from run to run."""
    try:
        return make()
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        words = " ".join(str(error).split())
        return words.rsplit("adapter_config.json: ", 1)[-1]


# The page -----------------------------------------------------------------------------------------------------------


def render(cells: dict[tuple[str, str], Cell]) -> str:
    """docs/conformance.md."""
    reasons: dict[str, int] = {}
    tables = [_table(cells, reasons, field, title) for title, field in TABLES.items()]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return "\n".join(
        [
            "# Conformance with Hugging Face PEFT",
            "",
            "Written by `make conformance` (`tests/conformance.py`), not by hand. CPU, float32, tiny random models of",
            "two or three layers, rows padded on the right, on the left and not at all (behind a prompt RoBERTa and",
            "XLM-R without the left: peft counts padding in their positions there).",
            "",
            f"{versions}.",
            "",
            "From jpeft to peft: an adapter with random leaves is exported, the real peft loads it, and the cell is",
            "the largest difference of their outputs at a token. From peft to jpeft: the real peft trains an adapter",
            "for three steps and saves it (AdaLoRA from values away from its start, which it leaves slowly), jpeft",
            "imports it, and the cell is the same difference. There and back: the",
            "bytes in which what jpeft exported differs after an import and another export. The limit of a difference",
            f"is {LIMIT:.0e}. A number in brackets is a refusal, whose words are below.",
            *tables,
            "",
            "## Refusals",
            "",
            *(f"{number}. {_escaped(words)}" for words, number in reasons.items()),
            "",
        ]
    )


def _table(cells: dict[tuple[str, str], Cell], reasons: dict[str, int], field: str, title: str) -> str:
    columns = list(dict.fromkeys(family for _, family in cells))
    lines = ["", f"## {title}", "", f"| method | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for kind in dict.fromkeys(kind for kind, _ in cells):
        values = (getattr(cells[kind, family], field) for family in columns)
        lines.append(f"| {kind} | {' | '.join(_shown(value, reasons) for value in values)} |")
    return "\n".join(lines)


def _shown(value: float | int | str, reasons: dict[str, int]) -> str:
    if isinstance(value, str):
        return f"[{reasons.setdefault(value, 1 + len(reasons))}]"
    return str(value) if isinstance(value, int) else f"{value:.1e}"


def _escaped(words: str) -> str:
    """`words` as plain text of a page, the first 300 characters."""
    words = words if len(words) <= 300 else f"{words[:297]}..."
    return "".join(f"\\{c}" if c in "*_<|`" else c for c in words)


def failures(cells: dict[tuple[str, str], Cell]) -> Iterable[str]:
    """The cells above the limit."""
    for (kind, family), cell in cells.items():
        for field, limit in (("exported", LIMIT), ("imported", LIMIT), ("again", 0)):
            value = getattr(cell, field)
            if not isinstance(value, str) and not value <= limit:
                yield f"{kind} on {family}, {field}: {value}"


def main() -> None:
    """Measures the methods named (all by default), and writes the page if they are all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="kinds of methods to measure; all of them write the page")
    parser.add_argument("--log", type=Path, help="file that takes every cell, and whose cells are not measured again")
    options = parser.parse_args()
    kinds = options.methods or [*jpeft.METHODS]
    logging.disable(logging.WARNING)
    cells, known = {}, _logged(options.log)
    for place in ((kind, name) for kind in kinds for name in families()):
        cells[place] = known[place] if place in known else measure(place[0], families()[place[1]])
        line = " ".join([*place, json.dumps(dataclasses.asdict(cells[place]))])
        print(line, flush=True)
        if options.log is not None and place not in known:
            with options.log.open("a", encoding="utf-8") as log:
                log.write(f"{line}\n")
    if kinds == [*jpeft.METHODS]:
        PAGE.write_text(render(cells), encoding="utf-8")
    sys.exit("\n".join(failures(cells)) or 0)


def _logged(log: Path | None) -> dict[tuple[str, str], Cell]:
    """The cells in a log."""
    if log is None or not log.is_file():
        return {}
    lines = (line.split(" ", 2) for line in log.read_text(encoding="utf-8").splitlines())
    return {(kind, family): Cell(**json.loads(cell)) for kind, family, cell in lines}


if __name__ == "__main__":
    main()
