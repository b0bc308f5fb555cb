# SPDX-License-Identifier: Apache-2.0
"""The values that cross between the two processes: a closed grammar, and exact types on both sides.

One message is one line of JSON. What JSON cannot say is tagged, `{"float": "0x1.8p+0"}`, so that a value comes out as
it went in, NaN included. Nothing else can be said: no object with a method of its own, no reference, no code. Whatever
bytes an untrusted process writes, the reader gets one of these values or an error.
"""

import json
from collections.abc import Callable
from typing import Any

#: How deep values may lie in each other, and how long a message may be.
MOST_DEEP, MOST_BYTES = 64, 2**20


class ValueRefused(ValueError):
    """A value outside the grammar, or a message that says none."""


def encode(value: Any) -> bytes:
    """A value as one line.

    Raises:
      ValueRefused: it, or something in it, is of another type than the grammar's, lies too deep, or is too long.
    """
    line = json.dumps(_tagged(value, 0), separators=(",", ":")).encode("ascii") + b"\n"
    if len(line) > MOST_BYTES:
        raise ValueRefused(f"a value of {len(line):,} bytes; {MOST_BYTES:,} may cross")
    return line


def decode(line: bytes) -> Any:
    """The value that a line says.

    Raises:
      ValueRefused: it says none.
    """
    if len(line) > MOST_BYTES:
        raise ValueRefused(f"a message of more than {MOST_BYTES:,} bytes")
    try:
        return _plain(json.loads(line, parse_int=_refused, parse_float=_refused, parse_constant=_refused), 0)
    except ValueRefused:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        raise ValueRefused(f"a message that is no value: {error!s:.200}") from None


def _refused(text: str) -> Any:
    raise ValueRefused(f"a bare number, {text:.40}")


def _tagged(value: Any, depth: int) -> Any:
    if depth > MOST_DEEP:
        raise ValueRefused(f"values more than {MOST_DEEP} deep in each other")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is list:
        return [_tagged(item, depth + 1) for item in value]
    if kind in _WRITE:
        return {kind.__name__: _WRITE[kind](value)}
    if kind in _COLLECTIONS:
        return {kind.__name__: [_tagged(item, depth + 1) for item in value]}
    if kind is dict:
        return {"dict": [[_tagged(key, depth + 1), _tagged(item, depth + 1)] for key, item in value.items()]}
    raise ValueRefused(f"a value of type {kind.__name__}; what may cross are {', '.join(_NAMES)}")


def _plain(said: Any, depth: int) -> Any:
    if depth > MOST_DEEP:
        raise ValueRefused(f"values more than {MOST_DEEP} deep in each other")
    if said is None or isinstance(said, bool | str):
        return said
    if isinstance(said, list):
        return [_plain(item, depth + 1) for item in said]
    if not isinstance(said, dict) or len(said) != 1:
        raise ValueRefused("an object with other than one tag")
    ((tag, inner),) = said.items()
    if tag in _READ and isinstance(inner, str):
        return _READ[tag](inner)
    if tag in _BY_NAME and isinstance(inner, list):
        return _BY_NAME[tag](_plain(item, depth + 1) for item in inner)
    if tag == "dict" and isinstance(inner, list):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in inner}
    raise ValueRefused(f"an unknown tag, {tag:.40}")


def _complex(text: str) -> complex:
    real, imaginary = text.split(" ")
    return complex(float.fromhex(real), float.fromhex(imaginary))


_WRITE: dict[type, Callable[[Any], str]] = {
    int: hex,  # decimal digits take quadratic time
    float: float.hex,
    complex: lambda z: f"{z.real.hex()} {z.imag.hex()}",
    bytes: bytes.hex,
}
_READ: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": _complex,
    "bytes": bytes.fromhex,
}
_COLLECTIONS = (tuple, set, frozenset)
_BY_NAME = {kind.__name__: kind for kind in _COLLECTIONS}
_NAMES = ("None", "bool", "str", "list", "dict", *_READ, *_BY_NAME)
