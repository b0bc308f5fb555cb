# SPDX-License-Identifier: Apache-2.0
"""README.md of an exported adapter: what it was trained from and on, how well it does, how to load it; of a merge."""

import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Mapping
from typing import Any

from .._summary import Row, Summary
from ._drift import Drift

_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "IMAGE_CLS": "image-classification",
    "MULTIPLE_CHOICE": "multiple-choice",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "MULTIPLE_CHOICE": "AutoModelForMultipleChoice",
    "IMAGE_CLS": "AutoModelForImageClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
#: Of what reads no tokens, where transformers has other classes for it.
_AUTO_READING = {("SEQ_2_SEQ_LM", "input_features"): "AutoModelForSpeechSeq2Seq"}


def installed() -> dict[str, str]:
    """The versions of what an adapter is made with."""
    return {name: importlib.metadata.version(name) for name in ("jpeft", "jax", "flax")}


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model card says beyond what the adapter itself tells.

    Attributes:
      data: what it was trained and evaluated on, in words.
      metrics: figures by name, such as `{"validation accuracy": 0.847}`.
      versions: of the software; those installed by default.
    """

    data: str = ""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=installed)


def render(card: Card, config: Mapping[str, Any], row: Row, task: str, reads: str) -> str:
    """README.md for an adapter with this adapter_config.json, of which `row` is the summary, on a model for `task`.

    `reads` is what the model is called with (`jpeft.models.Family`).
    """
    base = config["base_model_name_or_path"]
    blocks = [
        _front_matter(
            _hub_entries(base, task) | {"library_name": "peft", "tags": ["jpeft", config["peft_type"].lower()]}
        ),
        f"# {config['peft_type']} adapter" + (f" for {base}" if base else ""),
        f"Trained with jpeft: {row.trainable:,} parameters, which change {row.changed:,} of the base model's.",
        f"    {_short(row.method)}",
    ]
    return "\n\n".join([*blocks, *_told(card, _use(config, task, reads))]) + "\n"


def render_own(card: Card, counts: Summary, task: str, base: str) -> str:
    """README.md for adapters in jpeft's own format, on a model for `task`."""
    use = f"```\njpeft inspect --model {base} --adapter path/to/this/folder\n```\nNo other library has a form for it."
    blocks = [
        _front_matter(_hub_entries(base, task) | {"library_name": "jpeft", "tags": ["jpeft"]}),
        f"# jpeft adapter for {base}",
        f"Trained with jpeft: {counts.trainable:,} parameters, which change {counts.changed:,} of the base model's.",
        "\n".join(f"    {_short(row.method)}" for row in counts.rows),
        *_told(card, use),
    ]
    return "\n\n".join(blocks) + "\n"


def _told(card: Card, use: str) -> list[str]:
    """Data, results, how to use it, and the versions: the end of every adapter's card."""
    blocks = []
    if card.data:
        blocks += ["## Data", card.data]
    if card.metrics:
        blocks += ["## Results", _table("metric", "value", {k: f"{v:.4g}" for k, v in card.metrics.items()})]
    return [*blocks, "## Use", use, "## Versions", _table("software", "version", card.versions)]


def render_merged(drift: Drift, counts: Summary, task: str, base: str | None) -> str:
    """README.md for a merged model: what went into it, and what merging changed."""
    entries = _hub_entries(base, task) | {"library_name": "transformers", "tags": ["jpeft", "merged"]}
    blocks = [
        _front_matter(entries),
        "# Merged model" + (f" of {base}" if base else ""),
        f"Adapters of jpeft that change {counts.changed:,} of the base model's {counts.base:,} parameters are merged:",
        "\n".join(f"    {_short(row.method)}" for row in counts.rows),
        "## Drift",
        f"How far the outputs are from those of the base with the adapters beside it, on {drift.sample}:",
        _table("measure", "value", _measures(drift)),
        "## Versions",
        _table("software", "version", installed()),
    ]
    return "\n\n".join(blocks) + "\n"


def _measures(drift: Drift) -> dict[str, str]:
    found = {"largest difference of a logit": f"{drift.logit:.3g}", "largest logit": f"{drift.largest:.3g}"}
    if drift.kl is not None and drift.agreement is not None:
        found["KL(adapted, merged), mean, nats"] = f"{drift.kl:.3g}"
        found["same argmax"] = f"{100 * drift.agreement:.2f} % of {drift.count:,}"
    return found


def _short(method: Any) -> str:
    """The method with the options that are not its defaults."""

    def default(field: dataclasses.Field[Any]) -> Any:  # a method as a whole may have none: some fields must be given
        return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()

    names = [field.name for field in dataclasses.fields(method) if getattr(method, field.name) != default(field)]
    return f"{type(method).__name__}({', '.join(f'{name}={getattr(method, name)!r}' for name in names)})"


def _front_matter(entries: Mapping[str, Any]) -> str:
    """What the Hub reads."""
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in sorted(entries.items())), "---"])


def _hub_entries(base: str | None, task: str) -> dict[str, Any]:
    """The base, where the Hub can have it, and the task, where it has a name for it."""
    entries: dict[str, Any] = {}
    if base and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base):  # the Hub takes ids of its own only, and no folders
        entries["base_model"] = base
    if task in _PIPELINES:
        entries["pipeline_tag"] = _PIPELINES[task]
    return entries


def _use(config: Mapping[str, Any], task: str, reads: str) -> str:
    base = config["base_model_name_or_path"] or "path/to/base"
    auto = _AUTO_READING.get((task, reads), _AUTO[task])
    return (
        "```python\n"
        f"base = transformers.{auto}.from_pretrained({base!r})\n"
        'model = peft.PeftModel.from_pretrained(base, "path/to/this/folder")\n'
        "\n"
        f"base = jpeft.models.load({base!r}, task={task!r})  # or in JAX\n"
        'model = jpeft.import_peft(base, "path/to/this/folder")\n'
        "```"
    )


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
