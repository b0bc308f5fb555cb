# SPDX-License-Identifier: Apache-2.0
"""Folders whose weights are codes already: which tensors make one weight, and the leaves that they are.

Each weight of several tensors (codes, scales, what describes them) stands among a checkpoint's tensors as one of the
shape that it has in floats, so that names and shapes are checked as ever; its codes are kept bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from .._projections import Matmul, registered
from .._quantized import become_quantized, put_leaves
from . import _stored_bnb, _stored_groups, _stored_own
from ._files import CheckpointError, names
from ._safetensors import Tensor
from ._stored_config import Stored
from ._weights import Sharding


class Pack(NamedTuple):
    """A weight `[d_out, d_in]` in codes: `read` gives its scheme and its leaves."""

    shape: tuple[int, int]
    read: Callable[[], tuple[str, dict[str, np.ndarray]]]


class Codes:
    """The weights of a folder that are codes, and in time their schemes by the path of their kernel.

    Args:
      tensors: of the folder.
      stored: what its config.json says of them; None where it says nothing.
      sharding: as of `jpeft.models.load`.

    Raises:
      CheckpointError: a weight lacks some of its tensors, or they do not fit one another.
    """

    def __init__(self, tensors: Mapping[str, Tensor], stored: Stored | None, sharding: Sharding | None):
        self.schemes: dict[str, str] = {}
        self._sharding = sharding
        found = {} if stored is None else _FORMATS[stored.method](tensors, stored)
        self._packs = {name: Pack(*parts[:2]) for name, parts in found.items()}
        if stored is not None and not found:
            raise CheckpointError(f"config.json speaks of {stored.method} codes, and the checkpoint holds none")
        taken = {tensor for *_, own in found.values() for tensor in own}
        #: The tensors that are floats.
        self.plain = {name: tensor for name, tensor in tensors.items() if name not in taken}
        some = next(iter(tensors.values()), None)
        #: Those, and a tensor of its shape in floats for every weight in codes.
        self.tensors = self.plain | {
            name: some._replace(name=name, dtype="F32", shape=pack.shape)
            for name, pack in self._packs.items()
            if some is not None
        }

    def leaves(self, path: str, tensors: Sequence[Tensor], lead: Sequence[int]) -> Mapping[str, jax.Array] | None:
        """The leaves of the kernel at `path`, of one tensor a layer; None where it is in floats.

        Raises:
          CheckpointError: layers of one stack in different formats, or codes in the place of what is no kernel.
        """
        packs = [self._packs.get(tensor.name) for tensor in tensors]
        if not any(packs):
            return None
        plain = [tensor.name for tensor, pack in zip(tensors, packs, strict=True) if pack is None]
        if plain:
            raise CheckpointError(f"some layers of {path} are codes, and others are not: {names(plain)}")
        if not path.endswith("/kernel") or any(t.shape != p.shape for t, p in zip(tensors, packs, strict=True) if p):
            raise CheckpointError(f"{tensors[0].name} is codes, which {path} cannot be made of")
        schemes, read = zip(*(pack.read() for pack in packs if pack), strict=True)
        found = _stored_groups.alike(read)
        forms = {tuple((n, v.shape, v.dtype) for n, v in layer.items()) for layer in found}
        if len(forms) > 1 or len({*schemes}) > 1:
            raise CheckpointError(f"layers of {path} are codes of different formats")
        self.schemes[path] = schemes[0]
        stacked = {n: np.stack([f[n] for f in found]).reshape(*lead, *found[0][n].shape) for n in found[0]}
        return {f"{path}/{n}": self._put(f"{path}/{n}", value) for n, value in stacked.items()}

    def model(self, abstract: Any, leaves: Mapping[str, jax.Array]) -> Any:
        """`abstract`, in place, with codes where they were read."""
        for path, module in list(nnx.iter_modules(abstract)):
            projection = registered(module)
            if not isinstance(projection, Matmul):
                continue
            at = "/".join(map(str, (*path, projection.kernel)))
            if at in self.schemes:
                own = {key.removeprefix(f"{at}/"): leaf for key, leaf in leaves.items() if key.startswith(f"{at}/")}
                put_leaves(module, projection, own, self.schemes[at])
                become_quantized(module, projection)
        return abstract

    def _put(self, path: str, value: np.ndarray) -> jax.Array:
        return jax.device_put(value, None if self._sharding is None else self._sharding(path, _shape(value)))


def _shape(value: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


#: Weights by name: shape in floats, what reads them, and the names of the tensors that they are made of.
_FORMATS = {
    "bnb4": _stored_bnb.four_bits,
    "bnb8": _stored_bnb.eight_bits,
    "gptq": _stored_groups.gptq,
    "awq": _stored_groups.awq,
    "jpeft": _stored_own.weights,
}
