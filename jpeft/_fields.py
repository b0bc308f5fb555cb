# SPDX-License-Identifier: Apache-2.0
"""Values of a method's fields as they are kept: hashable, in one form, and checked."""

import math
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

#: What no width of a layer and no number of virtual tokens reaches; arrays so long are asked for by mistake.
MOST_SIZE = 2**20


def is_list(value: Any) -> bool:
    """Whether it is several values: a list, a tuple, a set, a range, an array, and no text or mapping."""
    return (
        isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)) and getattr(value, "ndim", 1) > 0
    )


def names(field: str, value: Any) -> Any:
    """What `targets`, `exclude` and `modules_to_save` take: a regular expression, names, or None.

    Raises:
      TypeError, ValueError: it is something else, or empty targets.
    """
    if isinstance(value, str) and field != "modules_to_save":
        return "all-linear" if field == "targets" and value.lower() == "all-linear" else value
    if value is None:
        return () if field == "exclude" else None
    found = value if is_list(value) else (value,)
    wrong = [name for name in found if not isinstance(name, str) or not name]
    if wrong:
        raise TypeError(f"{field} takes module names, got {wrong[0]!r}")
    found = tuple(sorted(found) if isinstance(found, (set, frozenset)) else found)
    if field == "targets" and not found:
        raise ValueError("targets is empty, so nothing would be trained; name at least one module")
    return found


def indices(layers: Any, field: str = "layers") -> tuple[int, ...] | None:
    """What `layers` takes: the indices of layers, or None for all.

    Raises:
      ValueError: it is something else, or empty.
    """
    if layers is None:
        return None
    found = [int(i) if isinstance(i, np.integer) else i for i in (layers if is_list(layers) else (layers,))]
    wrong = [index for index in found if not isinstance(index, int) or isinstance(index, bool) or index < 0]
    if wrong or not found:
        raise ValueError(f"{field} takes the indices of layers, counted from 0, got {layers!r}")
    return tuple(sorted(set(found)))


def several(method: str, field: str, value: Any) -> tuple[str, ...]:
    """Names: one, or several in an order that counts.

    Raises:
      ValueError: it is something else.
    """
    found = (value,) if isinstance(value, str) else value
    if not is_list(found) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{method}'s {field} takes names, as strings, got {value!r}")
    return tuple(found)


def by_name(method: str, field: str, value: Any) -> "Frozen":
    """What `rank_pattern` and `alpha_pattern` take: a mapping of regular expressions to numbers; None for none.

    Raises:
      ValueError: it is something else, or a key is no regular expression.
    """
    if value is not None and (not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value)):
        raise ValueError(f"{method}'s {field} takes a mapping of modules' names to numbers, got {value!r}")
    for key in value or ():
        try:
            re.compile(key)
        except re.error as wrong:
            message = f"{method}'s {field} has the key {key!r}, which is no regular expression: {wrong}"
            raise ValueError(message) from None
    return Frozen(value or {})


def whole(method: str, field: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
      ValueError: it is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{method}'s {field} must be a whole number of at least {least}, got {value!r}{_hint(value)}")
    return value


def extent(method: str, field: str, value: Any) -> int:
    """A length of an axis that a method makes: a whole number of 1 to `MOST_SIZE`.

    Raises:
      ValueError: it is something else.
    """
    if whole(method, field, value) > MOST_SIZE:
        raise ValueError(f"{method}'s {field} must be at most {MOST_SIZE:,}, got {value!r}: no layer is as wide")
    return value


def token_ids(method: str, value: Any) -> tuple[int, ...]:
    """Ids of tokens, each once.

    Raises:
      TypeError, ValueError: they are something else, or none.
    """
    if not is_list(value):
        raise TypeError(f"{method} takes the ids of tokens, got {value!r}")
    tokens = tuple(int(i) if isinstance(i, np.integer) else i for i in value)
    for token in tokens:
        whole(method, "token index", token, least=0)
    twice = sorted({token for token in tokens if tokens.count(token) > 1})
    if twice or not tokens:
        what = f"{twice[0]} twice" if twice else "none"
        raise ValueError(f"{method} trains one row for each token that is named, once; got {what}")
    return tokens


def one_of(method: str, field: str, value: Any, choices: Iterable[Any]) -> Any:
    """One of the `choices`.

    Raises:
      ValueError: it is something else.
    """
    choices = tuple(choices)
    if not isinstance(value, Hashable) or value not in choices:
        raise ValueError(f"{method}'s {field} must be one of {', '.join(map(str, choices))}; got {value!r}")
    return value


def rate(method: str, field: str, value: Any) -> float:
    """A probability in [0, 1).

    Raises:
      ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{method}'s {field} must be in [0, 1), got {value!r}{_hint(value)}")
    return value


def number(method: str, field: str, value: Any) -> float:
    """A number.

    Raises:
      ValueError: it is something else.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{method}'s {field} must be a number, got {value!r}{_hint(value)}")
    return value


def positive(method: str, field: str, value: Any) -> float:
    """A number by which an update is multiplied: above 0, and finite.

    Raises:
      ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(
            f"{method}'s {field} must be a positive number (at 0 nothing is trained), got {value!r}{_hint(value)}"
        )
    return value


def _hint(value: Any) -> str:
    """What to write in the place of an array library's number, which is no plain value."""
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    if kind not in ("i", "u", "f") or value.shape != ():
        return ""
    return f"; pass {'float' if kind == 'f' else 'int'}(...) of it"


def selection(method: Any) -> None:
    """Brings `targets`, `exclude`, `layers` and `modules_to_save` of `method`, those that it has, to their kept form.

    Raises:
      TypeError, ValueError: one is wrong, or `layers` comes with a regular expression.
    """
    for field in ("targets", "exclude", "modules_to_save"):
        if hasattr(method, field):
            object.__setattr__(method, field, names(field, getattr(method, field)))
    if hasattr(method, "layers"):
        object.__setattr__(method, "layers", indices(method.layers))
        targets = getattr(method, "targets", None)
        if isinstance(targets, str) and targets != "all-linear" and method.layers is not None:
            raise ValueError("layers= picks among listed targets; with a regular expression, say the layers in it")


class Frozen(dict):
    """A hashable mapping, for the dict-valued fields of a method. Order counts: PEFT's patterns go first match wins."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        same_order = not isinstance(other, Frozen) or list(self) == list(other)
        return same_order and dict.__eq__(self, other)  # type: ignore[operator]

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("a method's fields cannot be changed; use dataclasses.replace")

    def __reduce__(self) -> Any:
        return Frozen, (dict(self),)
