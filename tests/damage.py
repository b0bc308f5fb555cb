# SPDX-License-Identifier: Apache-2.0
"""Files that were damaged, or made to do damage: what the tests of loaders feed to them, and what must come back."""

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: Deterministic, without a time limit; `long` for the slow lane.
SHORT = settings(derandomize=True, deadline=None, max_examples=25, database=None, suppress_health_check=[*HealthCheck])
LONG = settings(SHORT, max_examples=1500)

#: What stands in the place of an honest value.
ODD = st.sampled_from(
    [
        None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, -(10**30), 0.5, -1.5, 1e300, "", "x", "7", "../x",
        "/etc/passwd", "a\0b", "\u202e", "x" * 5000, "(", "(a+)+$", [], [[]], [None], ["x"], [""], [-1], [10**9],
        {}, {"x": 1}, {"x": None},
        {"": {}}, {"rope_type": "linear", "factor": 0}, {"rope_type": ["llama3"]}, {"(": 3},
    ]
)  # fmt: skip


def json_objects(honest):
    """An object with a few of its values changed, taken away or put there; as bytes."""
    keys = st.sampled_from([*sorted(honest), "unheard_of"])
    changes = st.dictionaries(keys, ODD, max_size=2)
    removals = st.sets(st.sampled_from(sorted(honest)), max_size=1)

    def changed(given, away):
        return json.dumps({k: v for k, v in (honest | given).items() if k not in away or k in given}).encode()

    return st.builds(changed, changes, removals)


@st.composite
def bytes_of(draw, honest):
    """Content cut short, made longer, with bits that flipped, or something else altogether."""
    kind = draw(st.sampled_from(["cut", "flip", "more", "zeros", "other", "nothing", "bomb", "twice", "numbers"]))
    if kind == "cut":
        return honest[: draw(st.integers(0, len(honest) - 1))]
    if kind == "flip":
        damaged = bytearray(honest)
        for bit in draw(st.lists(st.integers(0, 8 * min(len(honest), 4096) - 1), min_size=1, max_size=4)):
            damaged[bit // 8] ^= 1 << bit % 8
        return bytes(damaged)
    if kind == "more":
        return honest + draw(st.binary(min_size=1, max_size=9))
    if kind == "zeros":
        return bytes(len(honest))
    if kind == "other":
        return draw(st.binary(max_size=64))
    if kind == "bomb":
        depth = draw(st.sampled_from([65, 900, 5000, 200_000]))
        return draw(st.sampled_from([b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth + b"]" * depth]))
    if kind == "twice":
        return b'{"a": 1, "a": 2}'
    if kind == "numbers":
        return draw(
            st.sampled_from([b'{"a": 1e999}', b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": ' + b"9" * 5000 + b"}"])
        )
    return b""


def framed(header, data=b""):
    """A safetensors file of this header: an object, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@st.composite
def safetensors_of(draw, honest):
    """A safetensors file with its header changed, or its bytes."""
    if draw(st.booleans()):
        return draw(bytes_of(honest))
    length = int.from_bytes(honest[:8], "little")
    header, data = json.loads(honest[8 : 8 + length]), honest[8 + length :]
    name = draw(st.sampled_from(sorted(header)))
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "all", "length", "name", "value"]))
    if field == "length":
        return draw(st.sampled_from([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])).to_bytes(8, "little") + honest[8:]
    if field == "all" or name == "__metadata__":
        header[name] = draw(ODD)
    elif field == "name":
        header[draw(st.sampled_from(["", "../x", "x" * 3000, "\u202e"]))] = header.pop(name)
    elif field == "value":
        start = header[name]["data_offsets"][0]
        bad = draw(
            st.sampled_from([b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\x00\x00\xc0\x7f", b"\x01\x00\x80\xff"])
        )
        data = data[:start] + bad + data[start + 4 :]
    elif field == "dtype":
        header[name]["dtype"] = draw(st.sampled_from(["F64", "BF16", "F16", "I32", "U8", "BOOL", "F8_E4M3", "?", 3]))
    else:
        numbers = st.sampled_from([-8, -1, 0, 1, 2, 3, 4, 16, 2**31, 2**62, 2**64, 10**30, 1.5, "3", None])
        given_values = st.lists(numbers, max_size=3) | ODD
        header[name][field] = draw(given_values)
    return framed(header, data)
