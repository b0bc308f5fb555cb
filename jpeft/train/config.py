# SPDX-License-Identifier: Apache-2.0
"""What a run is told: one typed, checked configuration, from YAML with dotted overrides.

  config = load("sst2.yaml", ["optimizer.lr=1e-3", "train.seed=1"])

A key that does not exist is an error that names the nearest one, and so is a value of the wrong type or a combination
that would not do what it says. This file imports no JAX.
"""

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from . import _yaml

#: Tasks that `jpeft train` has data and metrics for.
TASKS = ("SEQ_CLS", "CAUSAL_LM")

_FORBID = {"extra": "forbid"}
_MOST_BYTES = 10**6


class ConfigError(ValueError):
    """A configuration that cannot be run as it stands."""


@dataclasses.dataclass(frozen=True)
class Model:
    """The base model.

    Attributes:
      path: a Hugging Face folder, or an id on the hub.
      task: `SEQ_CLS` or `CAUSAL_LM`.
      dtype: of the base's storage and computation; None keeps the checkpoint's. Adapters are float32.
      remat: what a layer keeps for the backward pass: `none`, `dots`, `full`, `names` or `offload`.
      quantize: `nf4`, `nf4_double` or `int8` keeps the base's linear layers as codes (QLoRA); None as they are. The
        adapter is used beside the same codes afterwards.
    """

    __pydantic_config__: ClassVar = _FORBID
    path: str
    task: Literal["SEQ_CLS", "CAUSAL_LM"]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    remat: Literal["none", "dots", "full", "names", "offload"] = "none"
    quantize: Literal["nf4", "nf4_double", "int8"] | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows and how they become tokens.

    Attributes:
      train, eval: a file or several, of one kind: `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt`.
      text: column of the text; a `.txt` file has one called `text`.
      label: column of the label, for classification: a name, or an index into `label_names`.
      label_names: all labels, in the order of the head's outputs; None takes those of the training rows, sorted.
      max_length: longest row in tokens.
      longer: what happens to longer text: `truncate` (counted and printed) or `split` into rows (language models).
      txt: what is one text of a `.txt` file: a `line`, a `paragraph` or the whole `document`.
      num_widths: into how many widths rows are padded at most; each is compiled once.
    """

    __pydantic_config__: ClassVar = _FORBID
    train: str | tuple[str, ...]
    eval: str | tuple[str, ...] = ()
    text: str = "text"
    label: str = "label"
    label_names: tuple[str, ...] | None = None
    max_length: int = 128
    longer: Literal["truncate", "split"] = "truncate"
    txt: Literal["line", "paragraph", "document"] = "line"
    num_widths: int = 8


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW and its learning rate.

    Attributes:
      lr: highest learning rate.
      schedule: towards 0 at the end by `linear` or `cosine`, or `constant`.
      warmup: share of all updates, in [0, 1), in which the rate rises from 0.
      weight_decay: biases and norms have none.
      betas, eps: of Adam.
      clip: largest norm of the gradient of the whole trainable tree; None does not clip.
      lora_plus_ratio: LoRA+ (Hayou et al. 2024): the rate of B over that of A.
    """

    __pydantic_config__: ClassVar = _FORBID
    lr: float = 1e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    lora_plus_ratio: float = 1.0


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how much at a time, and how often to look.

    Attributes:
      epochs: passes over the data; `max_steps` in its place counts updates.
      batch_size: rows at a time, over all devices.
      accumulation: batches per update.
      seed: of the order, the adapter's start and dropout; the same seed gives the same run.
      dropout: whether dropout, the model's own and the method's, is on in training.
      log_every: updates between two lines of metrics.jsonl.
      eval_every: updates between two evaluations; None is once an epoch.
    """

    __pydantic_config__: ClassVar = _FORBID
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int = 32
    accumulation: int = 1
    seed: int = 0
    dropout: bool = True
    log_every: int = 10
    eval_every: int | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """A run.

    Attributes:
      model, data, optimizer, train: see there.
      method: `kind`, one of `jpeft.METHODS`, and that method's own options.
      out: the run's folder, which must not hold a run yet.
      mesh: `"data=2,fsdp=2,tensor=2"`; None is one device.
    """

    __pydantic_config__: ClassVar = _FORBID
    model: Model
    data: Data
    out: str
    method: dict[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "lora"})
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: str | None = None


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `key.key=value` overrides; values are read as YAML.

    `$NAME` and `~` in paths are replaced. A relative path is relative to the working directory.

    Raises:
      FileNotFoundError: no such file.
      ConfigError: what is wrong, one line each.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no configuration file {file}")
    with file.open("rb") as stream:
        content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{file} has more than {_MOST_BYTES:,} bytes: it is no configuration")
    try:
        tree = _yaml.read(content.decode("utf-8")) or {}
    except ValueError as error:
        raise ConfigError(f"{file} is not YAML that can be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} holds a {type(tree).__name__}; a configuration is a mapping of keys to values")
    tree = overridden(tree, overrides)
    try:
        return parse(tree)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def overridden(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a tree of plain values with `key.key=value` set in it."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for override in overrides:
        path, equals, text = override.partition("=")
        *sections, key = path.split(".")
        if not equals or not all([*sections, key]):
            raise ConfigError(f"an override has the form section.key=value, got {override!r}")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {section} is a value and has no keys in it")
        try:
            node[key] = _yaml.read(text)
        except ValueError as error:
            raise ConfigError(f"override {override!r}: {error}") from error
    return tree


def parse(tree: Mapping[str, Any]) -> Config:
    """A configuration from plain values, checked.

    Raises:
      ConfigError: what is wrong, one line each.
    """
    import pydantic

    try:
        config = pydantic.TypeAdapter(Config).validate_python(_expanded(tree))
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_said(detail) for detail in error.errors())) from error
    wrong = _ranges(config) + _conflicts(config)
    if wrong:
        raise ConfigError("\n".join(wrong))
    return config


def dump(config: Config) -> str:
    """The configuration as YAML, every key written out; `parse` reads it back equal."""
    import yaml

    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def method(options: Mapping[str, Any]) -> Any:
    """The method that `{"kind": ..., **options}` describes.

    Raises:
      ConfigError: an unknown kind or option, one whose adapters cannot be saved, or a value that the method refuses.
    """
    from ..io.peft import CODECS
    from ..methods import METHODS

    options = dict(options)
    kind = options.pop("kind", None)
    if kind not in METHODS:
        raise ConfigError(f"method.kind is one of {', '.join(CODECS)}; got {kind!r}")
    if kind not in CODECS:
        raise ConfigError(
            f"method.kind={kind!r}: a run saves its adapter in PEFT's format, which jpeft writes of "
            f"{', '.join(CODECS)}; train a {METHODS[kind].__name__} in a loop of your own (jpeft.train.step.make_step)"
        )
    chosen: Any = METHODS[kind]
    known = [field.name for field in dataclasses.fields(chosen)]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError("\n".join(_unknown(f"method.{key}", [f"method.{name}" for name in known]) for key in unknown))
    try:
        return chosen(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method: {error}") from error


def paths(files: str | tuple[str, ...]) -> tuple[str, ...]:
    """One file or several, as a tuple."""
    return (files,) if isinstance(files, str) else tuple(files)


def _plain(value: Any) -> Any:
    """With lists in the place of tuples, which YAML does not know."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _ranges(config: Config) -> list[str]:
    """What is wrong with single values."""
    data, optimizer, train = config.data, config.optimizer, config.train
    counts = {
        "data.max_length": data.max_length,
        "data.num_widths": data.num_widths,
        "train.epochs": train.epochs,
        "train.max_steps": train.max_steps,
        "train.batch_size": train.batch_size,
        "train.accumulation": train.accumulation,
        "train.log_every": train.log_every,
        "train.eval_every": train.eval_every,
    }
    positive = {
        "optimizer.lr": optimizer.lr,
        "optimizer.eps": optimizer.eps,
        "optimizer.clip": optimizer.clip,
        "optimizer.lora_plus_ratio": optimizer.lora_plus_ratio,
    }
    shares = {"optimizer.warmup": optimizer.warmup, "optimizer.betas": max(optimizer.betas, key=abs)}
    wrong = [
        f"{key} must be 1 or more, got {value}" for key, value in counts.items() if value is not None and value < 1
    ]
    wrong += [f"{key} must be positive, got {x}" for key, x in positive.items() if x is not None and not x > 0]
    wrong += [f"{key} must be in [0, 1), got {value}" for key, value in shares.items() if not 0 <= value < 1]
    if optimizer.weight_decay < 0:
        wrong.append(f"optimizer.weight_decay must not be negative, got {optimizer.weight_decay}")
    return wrong


def _conflicts(config: Config) -> list[str]:
    """What is wrong with values together."""
    data, train, classify = config.data, config.train, config.model.task == "SEQ_CLS"
    kind, names = config.method.get("kind"), data.label_names
    rules = {
        "data.train names no file": not paths(data.train),
        "give one of train.epochs and train.max_steps, and leave the other null": (train.epochs is None)
        == (train.max_steps is None),
        "train.eval_every is set, and data.eval names no file": train.eval_every is not None and not paths(data.eval),
        "data.longer=split is for CAUSAL_LM: a piece of a text has no label": classify and data.longer == "split",
        "data.label_names is for SEQ_CLS; CAUSAL_LM has no labels": not classify and names is not None,
        f"data.label_names needs two or more different names, got {names}": (
            names is not None and (len(names) < 2 or len({*names}) < len(names))
        ),
        f"optimizer.lora_plus_ratio is for method.kind=lora, got {kind!r}": (
            config.optimizer.lora_plus_ratio != 1 and kind != "lora"
        ),
    }
    return [message for message, broken in rules.items() if broken]


def _said(detail: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a line."""
    where = ".".join(str(part) for part in detail["loc"] if str(part) != "str" and "[" not in str(part))
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown(where, _keys())
    if detail["type"] in ("missing", "missing_argument"):
        return f"{where} is missing"
    return f"{where}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r}"


def _unknown(key: str, known: Sequence[str]) -> str:
    return f"unknown key {key}; {nearest(key, known)}"


def nearest(key: str, known: Sequence[str]) -> str:
    """`did you mean a.b?`: the same name in another section, a similar one in this, or a similar one anywhere."""
    section, _, last = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    tails = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches
    found = [tails[last]] if last in tails else [siblings[tail] for tail in close(last, siblings, 1)]
    found = found or close(key, known, 1, 0.8) or [tails[tail] for tail in close(last, tails, 1, 0.7)]
    return f"did you mean {found[0]}?" if found else f"the keys are {', '.join(siblings.values() or known)}"


def _keys() -> list[str]:
    """Every key of a configuration, dotted."""
    out = []
    for field in dataclasses.fields(Config):
        out.append(field.name)
        if dataclasses.is_dataclass(field.type):
            out += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(field.type)]
    return out


def _expanded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """With `$NAME` and `~` replaced in what names a file."""
    tree = dict(tree)
    for section, keys in (("model", ("path",)), ("data", ("train", "eval"))):
        if isinstance(tree.get(section), dict):
            values = tree[section]
            tree[section] = values | {key: _path(values[key]) for key in keys if key in values}
    return tree | {"out": _path(tree["out"])} if "out" in tree else tree


def _path(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_path(item) for item in value]
    if not isinstance(value, str):
        return value
    value = os.path.expanduser(os.path.expandvars(value))
    if "$" in value:
        raise ConfigError(f"{value} names an environment variable that is not set")
    return value
