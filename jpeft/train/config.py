# SPDX-License-Identifier: Apache-2.0
"""What a run is told: one typed, checked configuration, from YAML with dotted overrides.

  config = load("sst2.yaml", ["optimizer.lr=1e-3", "train.seed=1"])

A key that does not exist is an error that names the nearest one, and so is a value of the wrong type or a combination
that would not do what it says. This file imports no JAX.
"""

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from . import _yaml, mistakes
from .sections import Data, Logging, Model, Optimizer, Preference, Train
from .sections._checks import FORBID, at_least_one
from .sections.model import SEEING
from .standing import METRICS

#: Tasks whose labels have names.
CLASSIFYING = ("SEQ_CLS", "TOKEN_CLS", "IMAGE_CLS")
#: Options of `data` that are for texts of every task.
TEXTUAL = ("text", "loss_on", "max_length", "txt", "num_widths", "window")

if TYPE_CHECKING:
    from .._method import Hybrid, Method

_MOST_BYTES = 10**6
_T = TypeVar("_T")


class ConfigError(ValueError):
    """A configuration that cannot be run as it stands."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A run.

    Attributes:
      model, data, optimizer, train, preference, logging: see there.
      method: `kind`, one of `jpeft.METHODS`, and that method's own options; or a list of them, for a hybrid.
      out: the run's folder, which must not hold a run yet.
      mesh: `"data=2,fsdp=2,tensor=2"`; None is one device.
      uneven: of weights with an axis that the mesh does not divide: `refuse`, or `whole` on every device.
      compilation_cache: folder that keeps compiled programs for later runs; `auto` is the user's, None keeps none.
      compilation_cache_mb: its largest size in megabytes, beyond which the programs that were not used for longest are
        removed; None is no bound.
    """

    __pydantic_config__: ClassVar = FORBID
    model: Model
    data: Data
    out: str
    method: dict[str, Any] | tuple[dict[str, Any], ...] = dataclasses.field(default_factory=lambda: {"kind": "lora"})
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    train: Train = dataclasses.field(default_factory=Train)
    preference: Preference = dataclasses.field(default_factory=Preference)
    logging: Logging = dataclasses.field(default_factory=Logging)
    mesh: str | None = None
    uneven: Literal["refuse", "whole"] = "refuse"
    compilation_cache: str | None = "auto"
    compilation_cache_mb: int | None = 2048


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `key.key=value` overrides; values are read as YAML.

    `$NAME` and `~` in paths are replaced. A relative path is relative to the working directory.

    Raises:
      FileNotFoundError: no such file.
      ConfigError: what is wrong, one line each.
    """
    tree = read(path, overrides)
    try:
        return parse(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a YAML file with overrides, not checked yet. Raises as `load`."""
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
    return overridden(tree, overrides)


def overridden(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a tree of plain values with `key.key=value` set in it."""
    tree = copy.deepcopy(dict(tree))
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
    config = validated(Config, _expanded(tree))
    wrong = _ranges(config) + _conflicts(config)
    if wrong:
        raise ConfigError("\n".join(wrong))
    return config


def validated(kind: type[_T], tree: Mapping[str, Any]) -> _T:
    """A dataclass from plain values, of the right types.

    Raises:
      ConfigError: keys that it does not have, with the nearest, and values of wrong types, one line each.
    """
    import pydantic

    wrong = mistakes.truths(kind, tree)
    try:
        found = pydantic.TypeAdapter(kind).validate_python(tree)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join([*wrong, *mistakes.said(error.errors(), mistakes.keys(kind))])) from error
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def dump(config: Config) -> str:
    """The configuration as YAML, every key written out; `parse` reads it back equal."""
    import yaml

    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(config: Config) -> dict[str, Any]:
    """The configuration as plain values, every key among them; `parse` reads them back equal."""
    return _plain(dataclasses.asdict(config))


def method(options: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> "Method | Hybrid":
    """The method that `{"kind": ..., **options}` describes, or the hybrid of a list of them.

    Raises:
      ConfigError: an unknown kind or option, or a value that the method refuses.
    """
    from .._method import Hybrid

    if isinstance(options, Mapping):
        return _method(options, "method")
    if not options:
        raise ConfigError("method is an empty list; name at least one method")
    return Hybrid(tuple(_method(part, f"method.{at}") for at, part in enumerate(options)))


def _method(options: Mapping[str, Any], where: str) -> "Method":
    from ..methods import METHODS

    options = dict(options)
    kind = options.pop("kind", None)
    if kind not in METHODS:
        raise ConfigError(f"{where}.kind is one of {', '.join(METHODS)}; got {kind!r}")
    chosen: Any = METHODS[kind]
    known = [field.name for field in dataclasses.fields(chosen)]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError("\n".join(mistakes.unknown(f"{where}.{k}", [f"{where}.{n}" for n in known]) for k in unknown))
    try:
        return chosen(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def paths(files: Any) -> tuple[str, ...]:
    """Where the sources of `data.train` or `data.eval` lie, one or several, as a tuple."""
    many = files if isinstance(files, tuple | list) else (files,)
    return tuple(file if isinstance(file, str) else file.path for file in many)


def _plain(value: Any) -> Any:
    """With lists in the place of tuples, which YAML does not know."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _ranges(config: Config) -> list[str]:
    """What is wrong within single sections."""
    parts = (config.data, config.optimizer, config.train, config.preference, config.logging)
    bound = at_least_one({"compilation_cache_mb": config.compilation_cache_mb})
    return [line for part in parts for line in part.wrong()] + bound


def _conflicts(config: Config) -> list[str]:
    """What is wrong with values together."""
    data, train, task = config.data, config.train, config.model.task
    writes, classify = task == "CAUSAL_LM", task in CLASSIFYING
    kinds = [part.get("kind") for part in ([config.method] if isinstance(config.method, dict) else config.method)]
    names, figures = data.label_names, METRICS["dpo" if train.objective == "dpo" else task]
    rules = {
        "data.train names no file": not paths(data.train),
        "uneven=whole is of a mesh, and there is none; give mesh": config.mesh is None and config.uneven == "whole",
        "give one of train.epochs and train.max_steps, and leave the other null": (train.epochs is None)
        == (train.max_steps is None),
        "train.eval_every is set, and data.eval names no file": train.eval_every is not None and not paths(data.eval),
        f"train.best is one of {', '.join(figures)}, the figures of this evaluation, got {train.best!r}": (
            train.best is not None and train.best not in figures
        ),
        "train.best is set, and data.eval names no file": train.best is not None and not paths(data.eval),
        "train.patience needs train.best, the figure that has to gain": (
            train.patience is not None and train.best is None
        ),
        f"train.objective=dpo is for CAUSAL_LM, got {task}": train.objective == "dpo" and not writes,
        "train.objective=dpo takes pairs, which are not packed; leave data.packing none": (
            train.objective == "dpo" and data.packing != "none"
        ),
        "the section preference is for train.objective=dpo": (
            train.objective != "dpo" and config.preference != Preference()
        ),
        f"train.samples is for a model that writes (CAUSAL_LM), got {task}": bool(train.samples) and not writes,
        "train.samples is set, and data.eval names no file: samples are written after evaluations": (
            bool(train.samples) and not paths(data.eval)
        ),
        "data.longer=split is for CAUSAL_LM: a piece of a text has no label": not writes and data.longer == "split",
        "preference.precompute takes all rows before training, and data.streaming holds some at a time": (
            config.preference.precompute and data.streaming
        ),
        "data.streaming has no end; give train.max_steps": data.streaming and train.max_steps is None,
        "data.streaming is for CAUSAL_LM; classes are counted over whole files": not writes and data.streaming,
        "data.streaming has no epoch at whose end to evaluate; give train.eval_every": (
            data.streaming and bool(paths(data.eval)) and train.eval_every is None
        ),
        "data.packing is for CAUSAL_LM and SEQ_2_SEQ_LM: a packed row has no one label": (
            not writes and task != "SEQ_2_SEQ_LM" and data.packing != "none"
        ),
        f"data.template is for CAUSAL_LM; {task} has no messages": not writes and data.template is not None,
        f"data.loss_on is for CAUSAL_LM; {task} has no messages": (
            not writes and task not in SEEING and data.loss_on != Data.loss_on
        ),
        "data.loss_on is for train.objective=likelihood; dpo learns from the last answers": (
            train.objective == "dpo" and data.loss_on != Data.loss_on
        ),
        f"data.label_names is for {', '.join(CLASSIFYING)}; {task} has no labels": (not classify and names is not None),
        f"data.max_target is for SEQ_2_SEQ_LM, got {task}": task != "SEQ_2_SEQ_LM" and data.max_target is not None,
        f"data.stride is for QUESTION_ANS, got {task}": task != "QUESTION_ANS" and data.stride is not None,
        f"data.label_names needs two or more different names, got {names}": (
            names is not None and (len(names) < 2 or len({*names}) < len(names))
        ),
        f"optimizer.lora_plus_ratio is for method.kind=lora, got {', '.join(map(repr, kinds))}": (
            config.optimizer.lora_plus_ratio != 1 and "lora" not in kinds
        ),
        "train.label_smoothing and train.z_loss are for train.objective=likelihood, and not for dpo": (
            train.objective == "dpo" and (train.label_smoothing > 0 or train.z_loss > 0)
        ),
        "train.neftune needs train.dropout=true: its noise is drawn from the same key": (
            train.neftune > 0 and not train.dropout
        ),
        "train.ema is not for method.kind=adalora, whose ranks an average would bring back": (
            train.ema is not None and "adalora" in kinds
        ),
    }
    return [message for message, broken in rules.items() if broken] + _of_texts(config)


def _of_texts(config: Config) -> list[str]:
    """Options that say how texts become tokens, where the model reads images."""
    if config.model.task not in SEEING:
        return []
    usual = Data(config.data.train)
    given = [name for name in TEXTUAL if getattr(config.data, name) != getattr(usual, name)]
    return [f"data.{name} is for models that read texts; {config.model.task} reads images" for name in given]


def _expanded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """With `$NAME` and `~` replaced in what names a file."""
    tree = dict(tree)
    for section, keys in (("model", ("path",)), ("data", ("train", "eval", "cache", "template"))):
        if isinstance(tree.get(section), dict):
            values = tree[section]
            tree[section] = values | {key: expanded_path(values[key]) for key in keys if key in values}
    return tree | {key: expanded_path(tree[key]) for key in ("out", "compilation_cache") if key in tree}


def expanded_path(value: Any) -> Any:
    """With `$NAME` and `~` replaced in a path, in several, and in what has a `path`; other values as they are."""
    if isinstance(value, dict) and "path" in value:
        return value | {"path": expanded_path(value["path"])}
    if isinstance(value, (list, tuple)):
        return [expanded_path(item) for item in value]
    if not isinstance(value, str):
        return value
    value = os.path.expanduser(os.path.expandvars(value))
    if "$" in value:
        raise ConfigError(f"{value} names an environment variable that is not set")
    return value
