# SPDX-License-Identifier: Apache-2.0
"""What `quantization_config` of a config.json says: whose codes a folder holds, and how they are laid out."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Stored(NamedTuple):
    """Codes of a folder.

    Attributes:
      method: `bnb4`, `bnb8`, `gptq`, `awq`, or `jpeft`.
      bits: of a code; 0 where every weight says its own.
      size: inputs that share a scale; -1 for all. Of GPTQ and AWQ.
      plus_one: whether a stored zero is one less than the zero meant (the first version of GPTQ's format).
    """

    method: str
    bits: int
    size: int = -1
    plus_one: bool = False


def stored(hf: Mapping[str, Any]) -> tuple[Stored | None, dict[str, Any]]:
    """What codes there are, if any, and config.json without its word on them.

    Raises:
      ValueError: a format that is not read; the message names it.
    """
    rest = dict(hf)
    said = rest.pop("quantization_config", None)
    if said is None:
        return None, rest
    if not isinstance(said, Mapping):
        raise ValueError(f"quantization_config must be a mapping; got {said!r:.100}")
    method = said.get("quant_method", "bitsandbytes" if "load_in_4bit" in said or "load_in_8bit" in said else None)
    readers = {"bitsandbytes": _bitsandbytes, "gptq": _gptq, "awq": _awq, "jpeft": _own}
    if method not in readers:
        raise ValueError(f"quantization_config has quant_method={method!r:.100}; read are {', '.join(readers)}")
    return readers[method](said), rest


def _bitsandbytes(said: Mapping[str, Any]) -> Stored:
    four, eight = (said.get(key, False) for key in ("load_in_4bit", "load_in_8bit"))
    if {four, eight} != {True, False}:
        raise ValueError(
            f"quantization_config of bitsandbytes must say either load_in_4bit or load_in_8bit; got {four!r:.50} and "
            f"{eight!r:.50}"
        )
    return Stored("bnb4", 4) if four else Stored("bnb8", 8)


def _gptq(said: Mapping[str, Any]) -> Stored:
    form = said.get("checkpoint_format", "gptq")
    _allow("gptq", "checkpoint_format", form, ("gptq", "gptq_v2"))
    _allow("gptq", "bits", said.get("bits"), (4, 8))
    _allow("gptq", "dynamic", said.get("dynamic") or None, (None,))
    _allow("gptq", "pack_dtype", said.get("pack_dtype", "int32"), ("int32", "torch.int32"))
    return Stored("gptq", said["bits"], _size("gptq", said), plus_one=form == "gptq")


def _awq(said: Mapping[str, Any]) -> Stored:
    _allow("awq", "bits", said.get("bits", said.get("w_bit")), (4,))
    version = said.get("version", "gemm")
    _allow("awq", "version", version.lower() if isinstance(version, str) else version, ("gemm",))
    _allow("awq", "zero_point", said.get("zero_point", True), (True,))
    return Stored("awq", 4, _size("awq", said))


def _own(said: Mapping[str, Any]) -> Stored:
    _allow("jpeft", "version", said.get("version"), (1,))
    return Stored("jpeft", 0)


def _size(method: str, said: Mapping[str, Any]) -> int:
    size = said.get("group_size", said.get("q_group_size"))
    if type(size) is not int or not (size == -1 or 0 < size <= 2**20):
        raise ValueError(f"quantization_config of {method} has group_size={size!r:.100}; it is -1 or a positive number")
    return size


def _allow(method: str, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise ValueError(
            f"quantization_config of {method} has {key}={value!r:.100}; read is {' or '.join(map(str, allowed))}"
        )
