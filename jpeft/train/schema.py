# SPDX-License-Identifier: Apache-2.0
"""The configuration as JSON Schema, for editors and other programs; what a key means is read from the docstrings."""

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from .config import Config


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a configuration file, every key with its meaning."""
    import pydantic

    schema = pydantic.TypeAdapter(Config).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    parts = {kind.__name__: kind for kind in sections()}
    for name, found in {"Config": schema, **schema["$defs"]}.items():
        told = meanings(parts[name])
        found["description"] = (inspect.getdoc(parts[name]) or "").partition("\n")[0]
        for key, value in found["properties"].items():
            value["description"] = told[key]
    return schema


def markdown() -> str:
    """Every section as a table of keys, types, defaults and meanings."""
    return "\n".join(_table(kind) for kind in sections())


def _table(kind: type) -> str:
    told, lines = meanings(kind), [f"### {kind.__name__}", "", "| key | values | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = "" if required or field.default is dataclasses.MISSING else f"`{field.default!r}`"
        cells = f"`{field.name}`", _said(field.type), default or ("required" if required else ""), told[field.name]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _said(annotation: Any) -> str:
    """An annotation in words."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " or ".join(dict.fromkeys("null" if part is type(None) else _said(part) for part in parts))
    if typing.get_origin(annotation) is tuple:
        return f"list of {' or '.join(dict.fromkeys(_said(part) for part in parts if part is not Ellipsis))}"
    if typing.get_origin(annotation) is dict:
        return "mapping"
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    return words.get(annotation.__name__, str(annotation.__name__))


def sections() -> list[type]:
    """The dataclasses that a configuration is made of, itself first."""
    found: list[type] = [Config]
    for kind in found:
        for field in dataclasses.fields(kind):
            found += dict.fromkeys(inner for inner in _dataclasses(field.type) if inner not in found)
    return found


def meanings(kind: type) -> dict[str, str]:
    """What each key of a section means, as the section's docstring says under `Attributes:`.

    Raises:
      ValueError: a key is not explained, or something is that is no key.
    """
    _, _, text = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for names, meaning in re.findall(r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", text, re.MULTILINE):
        found |= dict.fromkeys(re.split(r",\s*", names), " ".join(meaning.split()))
    keys = {field.name for field in dataclasses.fields(kind)}
    if set(found) != keys:
        raise ValueError(f"{kind.__name__} explains {sorted(found)}, and its keys are {sorted(keys)}")
    return found


def _dataclasses(annotation: Any) -> list[type]:
    """Those in an annotation."""
    if dataclasses.is_dataclass(annotation) and not isinstance(annotation, types.GenericAlias):
        return [typing.cast(type, annotation)]
    return [inner for part in typing.get_args(annotation) for inner in _dataclasses(part)]
