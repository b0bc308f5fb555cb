# SPDX-License-Identifier: Apache-2.0
"""What is wrong with plain values that are to be a dataclass: a line for each mistake, by its dotted key."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

#: pydantic's types of mistakes that are about keys; all others are about a value.
_UNKNOWN, _MISSING = ("unexpected_keyword_argument", "extra_forbidden"), ("missing", "missing_argument")
#: pydantic's words for what YAML calls otherwise.
_WORDS = {"a valid tuple": "a list", r"a dictionary or an instance of \w+": "a mapping"}


def said(details: Sequence[Mapping[str, Any]], known: Sequence[str]) -> list[str]:
    """pydantic's errors as lines.

    Of a value that could be of several kinds pydantic says why it is none of them; here that is one line, and none
    where something inside the value is what is wrong.

    Args:
      details: of `ValidationError.errors`.
      known: all keys, of `keys`.
    """
    named = {name.rpartition(".")[2] for name in known}
    lines: dict[str, str] = {}
    values: dict[str, tuple[list[str], Any]] = {}
    for detail in details:
        where = ".".join(str(part) for part in detail["loc"] if _is_key(part, named))
        if detail["type"] in _UNKNOWN:
            lines[where] = unknown(where, known)
        elif detail["type"] in _MISSING:
            lines[where] = f"{where} is missing"
        else:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            for theirs, ours in _WORDS.items():
                message = re.sub(theirs, ours, message)
            values.setdefault(where, ([], detail["input"]))[0].append(message)
    for where, (messages, given) in values.items():
        if not any(other.startswith(f"{where}.") for other in [*lines, *values]):
            first, *rest = messages
            kinds = [first, *(message.removeprefix("input should be ") for message in rest)]
            lines[where] = f"{where}: {', or '.join(kinds)}, got {given!r}"
    return [*lines.values()]


def truths(kind: Any, tree: Any, where: str = "") -> list[str]:
    """Where `true` or `false` stands for a number, which pydantic takes as 1 and 0; a line each.

    Args:
      kind: the dataclass, or the annotation of one of its fields.
      tree: plain values.
      where: the key that they stand at.
    """
    if isinstance(tree, bool):
        kinds = {kind, *_parts(kind)}
        return [f"{where}: a number is wanted, got {tree!r}"] if kinds & {int, float} and bool not in kinds else []
    if isinstance(tree, list | tuple):
        items = [inner for part in _parts(kind) for inner in typing.get_args(part) if inner is not Ellipsis]
        return [line for at, item in enumerate(tree) for line in truths(_either(items), item, f"{where}.{at}")]
    if not isinstance(tree, Mapping):
        return []
    values = [typing.get_args(part)[1] for part in _parts(kind) if typing.get_origin(part) in (dict, Mapping)]
    found = [line for inner in values for key, value in tree.items() for line in truths(inner, value, f"{where}.{key}")]
    for inner in _dataclasses(kind):
        for field in dataclasses.fields(inner):
            if field.name in tree:
                found += truths(field.type, tree[field.name], f"{where}.{field.name}".removeprefix("."))
    return found


def keys(kind: Any) -> list[str]:
    """Every key of a dataclass, of its sections, and of what stands in their lists, dotted; the deepest last."""
    own, deeper = [], []
    for field in dataclasses.fields(kind):
        own.append(field.name)
        for inner in _dataclasses(field.type):
            names = [f"{field.name}.{name}" for name in keys(inner)]
            own += [name for name in names if name.count(".") == 1 and dataclasses.is_dataclass(field.type)]
            deeper += [name for name in names if name not in own]
    return own + deeper


def unknown(key: str, known: Sequence[str]) -> str:
    """A line on a key that is none of `known`."""
    return f"unknown key {key}; {nearest(re.sub(r'[.][0-9]+(?=[.])', '', key), known)}"


def nearest(key: str, known: Sequence[str]) -> str:
    """`did you mean a.b?`: the same name in another section, a similar one in this, or a similar one anywhere."""
    section, _, last = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    tails = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches
    found = [tails[last]] if last in tails else [siblings[tail] for tail in close(last, siblings, 1)]
    found = found or close(key, known, 1, 0.8) or [tails[tail] for tail in close(last, tails, 1, 0.7)]
    return f"did you mean {found[0]}?" if found else f"the keys are {', '.join(siblings.values() or known)}"


def _is_key(part: Any, named: set[str]) -> bool:
    """Whether a part of pydantic's path is a key or a number of a list, and not the name of one of several kinds."""
    kind = re.fullmatch(r"str|int|float|bool|[A-Z]\w*|.*\[.*", str(part))
    return kind is None or str(part) in named


def _parts(kind: Any) -> tuple[Any, ...]:
    """The kinds of a union; a kind alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _either(kinds: Sequence[Any]) -> Any:
    """The union of some kinds."""
    return typing.Union[tuple(part for kind in kinds for part in _parts(kind))] if kinds else None  # noqa: UP007


def _dataclasses(kind: Any) -> list[Any]:
    """The dataclasses of an annotation, those in its lists among them."""
    if dataclasses.is_dataclass(kind):
        return [kind]
    return list(dict.fromkeys(inner for part in typing.get_args(kind) for inner in _dataclasses(part)))
