# SPDX-License-Identifier: Apache-2.0
"""Which tensor of an adapter's file is which part of which leaf: one list, used to write the file and to read it."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from .._method import Adapter, Method, Site
from .._walk import Found, own_leaves
from ._names import Names

#: What PEFT puts before Hugging Face's names, where it wraps a model in a tuner; elsewhere it is "base_model.".
PREFIX = "base_model.model."


def without_repeats(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """With bias="all" PEFT writes the biases of saved modules a second and a third time, and reads them never."""
    repeats = (".original_module.", ".modules_to_save.") if config.get("bias") == "all" else ()
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in repeats)}


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor: its key without what PEFT puts before it, its leaf, and where in the leaf it lies.

    Attributes:
      key: `"model.layers.0.self_attn.q_proj.lora_A.weight"`.
      leaf: the variable that holds it, for one layer or a whole stack.
      index: its layer, and the rows and columns that are in use.
      axes: order in which the leaf's axes are the tensor's; None keeps it.
      sign: 1, or -1 where the tensor is the leaf's negative.
      prefix: what stands before the key in the file; None for the codec's own.
      cut: the leaf's axes cut apart, before they are put in order; None keeps them.
      shape: of a tensor that runs several of the axes together; None keeps them.
    """

    key: str
    leaf: nnx.Variable
    index: tuple[Any, ...] = ()
    axes: tuple[int, ...] | None = None
    sign: int = 1
    prefix: str | None = None
    cut: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def view(self, values: np.ndarray) -> np.ndarray:
        """The tensor, but for its sign and its own shape, as a view of its leaf's `values`."""
        view = values[self.index]
        return transposed(view if self.cut is None else view.reshape(self.cut), self.axes)


@dataclasses.dataclass(frozen=True)
class Codec:
    """How one method looks in PEFT's files; a method joins `CODECS` in `peft.py` with one of these.

    Attributes:
      kind: the method's kind.
      peft_type: PEFT's word for it.
      portable: an adapter in the form that PEFT's file can hold, the same function of its input.
      slots: the tensors of one adapter: (adapter, module, names) -> slots.
      write: the method's keys of adapter_config.json: (method, adapters, names) -> dict.
      read: the method of an adapter_config.json: (config, names) -> method.
      flag: the key that is true in such a config, where methods share a peft_type.
      shared: the tensors that all places share, given the adapter at the model's root.
      left_out: whole keys of tensors that a file with this configuration does without.
      copies: what PEFT puts between a module's name and its leaf's, where the adapter trains copies of the module's
        leaves as the method's own work; "" where it has them by `modules_to_save` or `bias`.
      counted: the tensors of a file that PEFT reads again, of those that it writes: (tensors, config) -> tensors.
      prefix: what stands before Hugging Face's names in the file.
      saves: whether PEFT saves a task's head, and modules that are trained whole, beside the method's own tensors.
      on_copies: whether PEFT puts the adapter of a table on what transformers has as its copies, too.
    """

    kind: str
    peft_type: str
    portable: Callable[[Adapter], Adapter]
    slots: Callable[[Adapter, Any, Names], list[Slot]]
    write: Callable[[Any, Sequence[Adapter], Names], dict[str, Any]]
    read: Callable[[dict[str, Any], Names], Method]
    flag: str | None = None
    shared: Callable[[Any], list[Slot]] = lambda adapter: []
    left_out: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda config: ()
    copies: Callable[[Adapter, Found], str] = lambda adapter, found: ""
    counted: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = without_repeats
    prefix: str = PREFIX
    saves: bool = True
    on_copies: bool = False

    def name(self, slot: Slot) -> str:
        """What the tensor is called in the file."""
        return (self.prefix if slot.prefix is None else slot.prefix) + slot.key


def all_slots(codec: Codec, adapters: Mapping[str, Adapter], names: Names) -> list[Slot]:
    """Every tensor of an adapter, given its parts by module path."""
    slots = []
    for path, adapter in adapters.items():
        if adapter.site.seam == "model":
            slots += codec.shared(adapter)
        if adapter.acts:
            slots += codec.slots(adapter, names.found[path].module, names)
        slots += _saved(codec, path, adapter, names)
    return slots


def per_layer(site: Site, tensors: Callable[[int], Iterable[Slot]]) -> list[Slot]:
    """The tensors of every layer that is adapted; `tensors` gives those of one, with keys and indices within it."""
    return [
        dataclasses.replace(slot, key=f"{name}.{slot.key}", index=(*layer_index(site.lead, i), *slot.index))
        for i, (name, acts) in enumerate(zip(site.names, site.active, strict=True))
        if acts
        for slot in tensors(i)
    ]


def whole(adapter: Adapter, module: Any) -> bool:
    """Whether `adapter` trains `module` whole (PEFT's modules_to_save), not only its bias."""
    return bool(adapter.saved_layers) and {*adapter.saved_layers} == {*own_leaves(module)}


def base_slots(path: str, leaves: Iterable[str], names: Names) -> list[Slot]:
    """The base's own leaves, as tensors of an adapter's file."""
    module = names.found[path].module
    return [
        Slot(tensor, getattr(module, leaf), place.index, place.axes)
        for leaf in leaves
        for tensor, place in names.tensors.items()
        if place.path == f"{path}/{leaf}"
    ]


def _saved(codec: Codec, path: str, adapter: Adapter, names: Names) -> list[Slot]:
    """Copies of the module's own leaves that are trained; on an adapted projection PEFT says `.base_layer`."""
    slots = []
    acting = {name for name, acts in zip(adapter.site.names, adapter.site.active, strict=True) if acts}
    for leaf, layers in adapter.saved_layers.items():
        mask = np.array(layers).reshape(adapter.site.lead)
        for slot in base_slots(path, [leaf], names):
            if mask[slot.index]:
                module, _, tensor = slot.key.rpartition(".")
                between = codec.copies(adapter, names.found[path]) or ("base_layer" if module in acting else "")
                key = ".".join(filter(None, (module, between, tensor)))
                slots.append(dataclasses.replace(slot, key=key, leaf=adapter.saved[leaf]))
    return slots


def transposed(values: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    """`values` with its axes in this order; None keeps them, where NumPy would turn them round."""
    return values if axes is None else values.transpose(axes)


def layer_index(lead: tuple[int, ...], layer: int) -> tuple[int, ...]:
    """Where layer number `layer` lies in a leaf with the layer axes `lead`."""
    return tuple(int(i) for i in np.unravel_index(layer, lead)) if lead else ()


def host(value: jax.Array, key: str, dtype: Any = np.float32) -> np.ndarray:
    """A leaf's values in this process's memory, as `dtype`.

    Raises:
      ValueError: parts of it are on other hosts.
    """
    if not (value.is_fully_addressable or value.is_fully_replicated):
        raise ValueError(f"{key} lies on several hosts; gather the trainable leaves on one before saving them")
    return np.asarray(value).astype(dtype)
