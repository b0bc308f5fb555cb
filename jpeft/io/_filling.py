# SPDX-License-Identifier: Apache-2.0
"""Tensors out of an adapter's leaves, and into them: the same for every format, given its slots."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from .._graft import grafts
from .._method import Adapter
from ..models import CheckpointError
from ..models import _safetensors as safetensors
from ._names import Names
from ._slots import Slot, host, transposed


class Held(NamedTuple):
    """A tensor in memory: its dtype in safetensors' words, its shape, and its values."""

    dtype: str
    shape: tuple[int, ...]
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a tensor of a file, cut out when it is read."""

    whole: safetensors.Tensor
    shape: tuple[int, ...]
    cut: Callable[[np.ndarray], np.ndarray]

    @property
    def dtype(self) -> str:
        """In safetensors' words."""
        return self.whole.dtype


#: A tensor of a file, on the disk, a part of one, or in memory.
Given = safetensors.Tensor | Piece | Held


def adapters_of(model: Any, name: str) -> dict[str, Adapter]:
    """The parts of one adapter, by the path of their module."""
    return {path: module.adapters[name] for path, module in grafts(model) if name in module.adapters}


def chosen_name(model: Any, name: str | None, format: str) -> str:
    """Which adapter is meant, where a folder of the `format` holds one.

    Raises:
      ValueError: no adapter, or several and no `name`.
    """
    there = sorted({name for _, module in grafts(model) for name in module.adapters})
    if not there:
        raise ValueError("the model has no adapter to export; jpeft.adapt puts one on it")
    if name is None and len(there) > 1:
        raise ValueError(f"the model has the adapters {', '.join(there)}, and {format} holds one: pass name=")
    if name is not None and name not in there:
        hybrid = any(own.startswith(f"{name}_") for own in there)
        one = f", parts of a hybrid, of which {format} holds one" if hybrid else ""
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(there)}{one}")
    return name or there[0]


def tensors_of(slots: Mapping[str, Slot]) -> dict[str, np.ndarray]:
    """What goes into a file, given each tensor's slot by its key.

    Raises:
      ValueError: values that are not finite.
    """
    values: dict[int, np.ndarray] = {}
    tensors = {}
    for key, slot in slots.items():
        if id(slot.leaf) not in values:
            values[id(slot.leaf)] = host(slot.leaf[...], slot.key)
        view = slot.view(values[id(slot.leaf)])
        tensors[key] = np.ascontiguousarray(slot.sign * view).reshape(slot.shape or view.shape)
    broken = [key for key, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"the adapter has values that are not finite, in {safetensors.names(broken)}")
    return tensors


def fill(slots: Mapping[str, Slot], tensors: Mapping[str, Given], names: Names, prefix: str) -> list[str]:
    """Sets every leaf from the file, or says all that keeps from it.

    Args:
      slots: by key in the file.
      prefix: what stands there before Hugging Face's names.
    """
    values = {id(slot.leaf): host(slot.leaf[...], key).copy() for key, slot in slots.items()}
    views = {key: slot.view(values[id(slot.leaf)]) for key, slot in slots.items()}
    views |= {key: base for key in tensors.keys() - slots.keys() if (base := _base(key, names, prefix)) is not None}
    shapes = {key: view.shape for key, view in views.items()}
    shapes |= {key: slot.shape for key, slot in slots.items() if slot.shape is not None}
    problems = [f"{key} is missing" for key in sorted(slots.keys() - tensors.keys())]
    problems += [f"{key} is unknown" for key in sorted(tensors.keys() - views.keys())]
    for key in sorted(views.keys() & tensors.keys()):
        problems += _misfit(key, tensors[key], shapes[key])
    if problems:
        return problems
    signs, read = {key: slot.sign for key, slot in slots.items()}, {}
    for key in sorted(views):
        try:
            read[key] = (signs.get(key, 1) * read_values(tensors[key])).reshape(views[key].shape)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        return problems
    for key in slots:
        views[key][...] = read[key]
    for key, view in views.items():
        if not np.array_equal(read[key].astype(view.dtype), view):
            problems.append(
                f"{key} differs from {'the tensor that it is tied to' if key in slots else 'the base model'}"
            )
    for leaf in {id(slot.leaf): slot.leaf for slot in slots.values()}.values():
        leaf.set_value(jax.device_put(values[id(leaf)].astype(leaf.dtype), leaf[...].sharding))
    return problems


def read_values(tensor: Given) -> np.ndarray:
    """A tensor's values as float32."""
    if isinstance(tensor, Held):
        return tensor.values.astype(np.float32)
    if isinstance(tensor, Piece):
        return tensor.cut(_whole(tensor.whole))
    return _whole(tensor)


@functools.lru_cache(maxsize=2)  # the pieces of a tensor are read one after another
def _whole(tensor: safetensors.Tensor) -> np.ndarray:
    out = np.empty(tensor.shape, np.float32)
    safetensors.read(tensor, [((slice(None),) * out.ndim, out)])
    return out


def sources(tensors: Mapping[str, np.ndarray]) -> dict[str, safetensors.Source]:
    """The same for `safetensors.write`, in the order of their keys."""
    return {key: safetensors.Source(t.shape, t.dtype, lambda t=t: t) for key, t in sorted(tensors.items())}


def keyed(slots: Iterable[Slot], key: Any) -> dict[str, Slot]:
    """Slots by their key in the file."""
    return {key(slot): slot for slot in slots}


def _base(key: str, names: Names, prefix: str) -> np.ndarray | None:
    """The base's own tensor of which `key` is a copy."""
    place = names.tensors.get(key.removeprefix(prefix).replace(".base_layer.", "."))
    if place is None:
        return None
    path, _, leaf = place.path.rpartition("/")
    return transposed(np.asarray(getattr(names.found[path].module, leaf)[...][place.index]), place.axes)


def _misfit(key: str, tensor: Given, shape: tuple[int, ...]) -> list[str]:
    if tensor.dtype not in safetensors.FLOATS:
        return [f"{key} is {tensor.dtype}, not one of {', '.join(safetensors.FLOATS)}"]
    if tensor.shape != shape:
        return [f"{key} is {list(tensor.shape)}, the model needs {list(shape)}"]
    return []
