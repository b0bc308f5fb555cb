# SPDX-License-Identifier: Apache-2.0
"""Where every leaf lives on a mesh: rules from path to PartitionSpec, kept outside of the models.

  mesh = jpeft.mesh("data=2,fsdp=2,tensor=2")
  model = jpeft.models.load(folder, sharding=jpeft.placement(mesh))      # each slice straight to its device
  model = jpeft.shard(jpeft.adapt(model, method, key=key), mesh)         # the adapters' leaves join the base
  graphdef, trainable, frozen = jpeft.partition(model)
  state = jpeft.optimizer_state(tx, trainable)

The compiler (GSPMD) does the rest: no model knows of a mesh, and the numbers do not depend on it.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ._bank import Bank
from ._graft import ADAPTERS
from ._masks import _pattern, mask
from ._mesh import written
from ._partition import combine, partition

_LOG = logging.getLogger("jpeft")

Rules = Sequence[tuple[str, P]]
Spec = tuple[Any, ...]
#: What becomes of a base's axis that the mesh does not divide.
Uneven = Literal["refuse", "whole"]

#: Projections out of the residual stream: what they give is split over `tensor`, and so is all that follows.
_COLUMN = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "lm_head", "proj_out"),
    *("self/query", "self/key", "self/value", "intermediate/dense"),
    *("q_lin", "k_lin", "v_lin", "lin1", "fc1"),
    *("query_proj", "key_proj", "value_proj", "pos_query_proj", "pos_key_proj", "embed_proj", "conv/conv"),
    *("c_attn", "c_fc"),
    *("*Attention/q", "*Attention/k", "*Attention/v", "wi", "wi_0", "wi_1"),
)
#: Projections back into it: what they get is split over `tensor`.
_ROW = (
    *("o_proj", "down_proj", "output/dense", "out_lin", "lin2", "fc2", "c_proj"),
    *("*Attention/o", "wo", "*_attn/out_proj"),
)
#: Projections of the experts of a layer, `[experts, d_in, d_out]`: the experts are split over `tensor`.
_EXPERTS = {"w1": P("tensor", "fsdp", None), "w2": P("tensor", None, "fsdp"), "w3": P("tensor", "fsdp", None)}
#: Convolutions that make an image or a sound into the residual stream.
_CONVOLUTIONS = ("patch_embeddings/projection", "conv1", "conv2")
_TABLES = ("embed_tokens", "word_embeddings", "wte", "shared")

#: The zoo's rules. A spec is about a leaf's last axes, `(d_in, d_out)` of a kernel, or `(experts, d_in, d_out)`; a
#: layer axis in front is whole.
#: The first rule that matches counts. What none matches is replicated: norms, small heads, biases of row projections.
SHARDING_RULES: Rules = (
    *((f"**/{name}/kernel", P("fsdp", "tensor")) for name in _COLUMN),
    *((f"**/{name}/bias", P("tensor")) for name in _COLUMN),
    *((f"**/{name}/kernel", P("tensor", "fsdp")) for name in _ROW),
    *((f"**/experts/{name}/kernel", spec) for name, spec in _EXPERTS.items()),
    *((f"**/{name}/embedding", P("tensor", "fsdp")) for name in _TABLES),
    *((f"**/{name}/kernel", P("fsdp")) for name in _CONVOLUTIONS),
)

#: What the last axes of an adapter's leaf are on the kernel: `A` is [d_in, rank], `B` is [rank, d_out]; so LoHa's.
_SIDES: Mapping[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("A", "A0", "A1", "A2"), ("in", None)),
    **dict.fromkeys(("B", "B0", "B1", "B2"), (None, "out")),
}


#: Leaves of a quantized kernel that lie as it does, d_in before d_out. The others are replicated: magnitudes of
#: magnitudes are small, and flat codes run across columns, so that no cut of them is one of the kernel.
_AS_KERNEL = ("codes", "scales")


def placement(
    mesh: Mesh, rules: Rules = SHARDING_RULES, *, uneven: Uneven = "refuse"
) -> Callable[[str, Any], NamedSharding]:
    """(path, leaf or its shape) -> where a base model's leaf lives: what `jpeft.models.load(..., sharding=)` takes.

    It raises as `shardings`.
    """
    return lambda path, leaf: NamedSharding(
        mesh, P(*_fit({path: _ruled(path, leaf, rules)}, {path: leaf}, mesh, uneven)[path])
    )


def shardings(
    leaves: Any, mesh: Mesh | AbstractMesh, rules: Rules = SHARDING_RULES, *, uneven: Uneven = "refuse"
) -> dict[str, NamedSharding]:
    """`{path: where the leaf lives}` for a model, or for a flat dict of its arrays or shapes, adapters included.

    An adapter's leaf derives its place from the base kernel beside it, whatever rule gave that: `A` has the kernel's
    input axis, `B` its output axis, the rank is whole; a saved copy lies as the leaf that it is of. What of a matrix of
    an adapter is not split over `fsdp` by that is split so along its longest axis that the mesh divides; vectors are
    replicated.

    Args:
      leaves: a model, or `{**trainable, **frozen}`: an adapter needs its base's kernel.
      mesh: as of `jpeft.mesh`; or one without devices, for places by shape.
      rules: (path pattern, PartitionSpec of the last axes), first match counts. For a model of your own put yours
        before the zoo's: `[("**/w1", P("fsdp", "tensor")), *jpeft.SHARDING_RULES]`.
      uneven: an axis of a base's leaf that the mesh does not divide is refused, or `"whole"` on every device. Scales of
        codes are few, and whole then without a word.

    Raises:
      ValueError: an axis that the mesh does not divide; a rule of your own that matches nothing; nothing that is split
        on a mesh with `fsdp` or `tensor`; a spec with more axes than its leaf, or with one that the mesh lacks; an
        adapter without its base; another word for `uneven`.

    Example:
      >>> shapes = nnx.eval_shape(lambda: jpeft.models.build(config, key=jax.random.key(0)))
      >>> places = jpeft.shardings(shapes, jpeft.mesh("fsdp=4,tensor=2"))
    """
    leaves = _flat(leaves)
    base = {path: leaf for path, leaf in leaves.items() if ADAPTERS not in path.split("/")}
    for pattern, _ in (rule for rule in rules if rule not in SHARDING_RULES):
        mask({**base, **{_kernel_of(path): leaf for path, leaf in base.items()}}, pattern)  # an error if it has none
    specs = _fit({path: _ruled(path, leaf, rules) for path, leaf in base.items()}, base, mesh, uneven)
    divides = math.prod(mesh.shape.get(name, 1) for name in ("fsdp", "tensor")) > 1
    if divides and not any(_ways(path, names, mesh) > 1 for path, spec in specs.items() for names in spec):
        raise ValueError(
            f"nothing splits any of the {len(base)} leaves, such as {next(iter(base), None)}, so each device of the "
            f"mesh {written(mesh.shape)} would hold the whole model; pass rules= for it"
        )
    firsts = _firsts(base)
    for path, leaf in leaves.items():
        if path not in base:
            spec, lead = _derived(path, leaf, leaves, specs), _lead(path, leaf, firsts)
            specs[path] = spec if "saved" in path.split("/") else _spread(path, spec, leaf.shape, lead, mesh)
    return {path: NamedSharding(mesh, P(*specs[path])) for path in leaves}


def shard(leaves: Any, mesh: Mesh, rules: Rules = SHARDING_RULES, *, uneven: Uneven = "refuse") -> Any:
    """A model, a flat dict of its arrays, or a `Bank`, with every leaf in its place; one that is there is not copied.

    With several processes each holds the same values, and keeps its own devices' slices of them. The adapters of a bank
    lie as each alone does, all slots on every device.

    Raises:
      ValueError: as `shardings`.
    """
    if isinstance(leaves, nnx.Module):
        graphdef, trainable, frozen = partition(leaves)
        placed = shard({**trainable, **frozen}, mesh, rules, uneven=uneven)
        return combine(graphdef, {p: placed[p] for p in trainable}, {p: placed[p] for p in frozen})
    if isinstance(leaves, Bank):
        return _bank_in_place(leaves, mesh, rules, uneven)
    places = shardings(leaves, mesh, rules, uneven=uneven)
    return {path: _put(leaf, places[path]) for path, leaf in leaves.items()}


def _bank_in_place(bank: Bank, mesh: Mesh, rules: Rules, uneven: Uneven) -> Bank:
    """A bank's base where it belongs, and every leaf of its adapters as one slot's, behind an axis of slots."""
    slots = {**bank.trainable, **bank.constants}
    one = {path: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for path, leaf in slots.items()}
    places = shardings({**bank.frozen, **one}, mesh, rules, uneven=uneven)
    behind = {path: NamedSharding(mesh, P(None, *places[path].spec)) for path in slots}
    base = {path: _put(leaf, places[path]) for path, leaf in bank.frozen.items()}
    trainable, constants = (
        {path: _put(leaf, behind[path]) for path, leaf in half.items()} for half in (bank.trainable, bank.constants)
    )
    return dataclasses.replace(bank, trainable=trainable, constants=constants, frozen=base)


def optimizer_state(tx: optax.GradientTransformation, trainable: Mapping[str, jax.Array]) -> Any:
    """`tx.init(trainable)` with every moment born where its parameter lives, and all else replicated.

    So a jitted step that is told to return its arguments' shardings compiles once. On one device it works as well.
    """
    return jax.jit(tx.init, out_shardings=mirrored(jax.eval_shape(tx.init, trainable), trainable))(trainable)


def mirrored(state: Any, trainable: Mapping[str, Any]) -> Any:
    """The shardings of an optimizer's state beside placed parameters, given its shapes.

    A leaf with a parameter's path and shape lies as that does; any other (a count, a factored moment) is replicated.
    """
    anchor = next(iter(trainable.values())).sharding
    whole = NamedSharding(anchor.mesh, P()) if isinstance(anchor, NamedSharding) else anchor

    def place(keys: tuple[Any, ...], leaf: Any) -> jax.sharding.Sharding:
        twins = (trainable[key.key] for key in keys if getattr(key, "key", None) in trainable)
        return next((twin.sharding for twin in twins if twin.shape == leaf.shape), whole)

    return jax.tree_util.tree_map_with_path(place, state)


def _flat(leaves: Any) -> dict[str, Any]:
    if not isinstance(leaves, nnx.Module):
        return dict(leaves)
    _, trainable, frozen = partition(leaves)
    return {**trainable, **frozen}


def _put(leaf: Any, place: NamedSharding) -> jax.Array:
    if not isinstance(leaf, jax.Array) or (leaf.is_fully_addressable and not place.is_fully_addressable):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), place), impl=jax.random.key_impl(leaf))
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, place, lambda index: values[index])
    if leaf.sharding == place:
        return leaf
    return jax.device_put(jnp.copy(leaf), place)  # without the copy, donating what is placed may take `leaf` along


def _ruled(path: str, leaf: Any, rules: Rules) -> Spec:
    """What the first rule that matches says, one entry per axis of the leaf; of codes, what it says of their kernel."""
    pattern, spec = next((rule for rule in rules if _pattern(rule[0]).fullmatch(path)), ("", P()))
    if not pattern and _kernel_of(path) != path:
        return _of_codes(leaf, next((spec for rule, spec in rules if _pattern(rule).fullmatch(_kernel_of(path))), P()))
    if len(spec) > leaf.ndim:
        raise ValueError(f"the rule {pattern!r} has {spec}, of {len(spec)} axes; {path} is {list(leaf.shape)}")
    return (None,) * (leaf.ndim - len(spec)) + tuple(spec)


def _kernel_of(path: str) -> str:
    """The path of the kernel that a leaf of codes or scales belongs to; any other path as it is."""
    kernel, _, name = path.rpartition("/")
    return kernel if name in _AS_KERNEL else path


def _flat_of(path: str) -> list[str] | None:
    """The module that flat codes belong to, by the parts of its path; None of any other leaf."""
    parts = path.split("/")
    return parts[:-2] if parts[-1] == "flat_codes" else None


def _of_codes(leaf: Any, spec: P) -> Spec:
    """The spec of codes or scales whose last axes are the kernel's d_in and d_out, packed; a scale may have one d_in.

    Experts stand in front of these two, below a layer axis. Any other kernel of more axes than two has no axis of the
    codes to itself, and is replicated.
    """
    if len(spec) != 2 and not (len(spec) == 3 < leaf.ndim):
        return (None,) * leaf.ndim
    own = tuple(None if n == 1 else s for n, s in zip(leaf.shape[-2:], spec[-2:], strict=True))
    return (None,) * (leaf.ndim - len(spec)) + tuple(spec[:-2]) + own


def _unpacked(path: str, leaf: Any) -> tuple[int, ...]:
    """The shape of the kernel's matrix that these codes stand for, or of the leaf itself."""
    packed = _kernel_of(path) != path and leaf.dtype == jnp.uint8
    return (*leaf.shape[:-2], 2 * leaf.shape[-2], leaf.shape[-1]) if packed else leaf.shape


def _derived(path: str, leaf: Any, leaves: Mapping[str, Any], specs: Mapping[str, Spec]) -> Spec:
    """An adapter leaf's spec, by its address `<module>/adapters/<name>/<leaf>`."""
    parts = path.split("/")
    at = parts.index(ADAPTERS)
    own = [p for p in specs if parts[:at] in (p.split("/")[:-1], _kernel_of(p).split("/")[:-1], _flat_of(p))]
    if not own and (at == 0 or (parts[at + 2] not in _SIDES and parts[at + 2] != "saved")):
        return (None,) * leaf.ndim  # at a seam without leaves of its own, or shared by the whole model
    if not own:
        raise ValueError(f"{path} has no base leaf beside it; give the trainable and the frozen leaves together")
    if parts[at + 2] == "saved":
        return specs["/".join(parts[:at] + parts[at + 3 :])]
    sides = _SIDES.get(parts[-1], (None,) * leaf.ndim)
    lead = leaf.ndim - len(sides)
    like = [p for p in own if leaves[p].ndim >= leaf.ndim]
    kernels = [(_unpacked(p, leaves[p])[lead:], specs[p][lead:]) for p in like]
    sizes = zip(sides, leaf.shape[lead:], strict=True)
    front = next((specs[p][:lead] for p in like), (None,) * lead)
    return (*front, *(_side(side, size, kernels) for side, size in sizes))


def _spread(path: str, spec: Spec, shape: tuple[int, ...], lead: int, mesh: Mesh | AbstractMesh) -> Spec:
    """`spec` with `fsdp` on the longest axis behind the `lead` first ones, of two or more, that the mesh divides."""
    taken = [name for names in spec for name in (names if isinstance(names, tuple) else (names,))]
    if mesh.shape.get("fsdp", 1) == 1 or "fsdp" in taken or len(shape) - lead < 2:
        return spec
    for axis in sorted(range(lead, len(shape)), key=lambda axis: (-shape[axis], -axis)):
        there = () if spec[axis] is None else spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
        if shape[axis] % _ways(path, (*there, "fsdp"), mesh) == 0:
            return (*spec[:axis], (*there, "fsdp") if there else "fsdp", *spec[axis + 1 :])
    return spec


def _firsts(base: Mapping[str, Any]) -> dict[tuple[str, ...], set[int]]:
    """By module's path, with how many entries its leaves and those of its modules begin."""
    found: dict[tuple[str, ...], set[int]] = {}
    for path, leaf in base.items():
        parts = tuple(path.split("/"))
        for depth in range(1, len(parts)):
            found.setdefault(parts[:depth], set()).add(leaf.shape[0] if leaf.ndim else 1)
    return found


def _lead(path: str, leaf: Any, firsts: Mapping[tuple[str, ...], set[int]]) -> int:
    """How many axes of an adapter's leaf stand in front of its own: those of layers, and of experts.

    A leaf that is no factor has a layer axis if all that one of the modules around it holds begins with as many.
    """
    *parts, name = path.split("/")
    if name in _SIDES:
        return leaf.ndim - len(_SIDES[name])
    around = (tuple(parts[:depth]) for depth in range(1, parts.index(ADAPTERS) + 1))
    return int(any(firsts.get(module) == {leaf.shape[0]} for module in around)) if leaf.ndim else 0


def _side(side: str | None, size: int, kernels: Sequence[tuple[tuple[int, ...], Spec]]) -> Any:
    """The mesh axes of a kernel's inputs or outputs, which are its first or last axes that make up `size`.

    Several axes laid into one can keep a split of the first alone.
    """
    for shape, spec in kernels if side else ():
        for cut in range(1, len(shape)):
            part = slice(cut) if side == "in" else slice(cut, None)
            if math.prod(shape[part]) == size:
                return None if any(spec[part][1:]) else spec[part][0]
    return None


def _fit(
    specs: Mapping[str, Spec], base: Mapping[str, Any], mesh: Mesh | AbstractMesh, uneven: Uneven
) -> dict[str, Spec]:
    """The specs of a base's leaves, whole along every axis that the mesh does not divide, if that may be."""
    if uneven not in get_args(Uneven):
        raise ValueError(f"uneven is one of {', '.join(get_args(Uneven))}; got {uneven!r}")
    fitting, odd = {}, []
    for path, spec in specs.items():
        shape = base[path].shape
        fits = [size % _ways(path, names, mesh) == 0 for size, names in zip(shape, spec, strict=True)]
        fitting[path] = tuple(names if ok else None for names, ok in zip(spec, fits, strict=True))
        if path.rpartition("/")[2] != "scales":
            odd += [f"{path} axis {i} of {shape[i]} over {_named(spec[i])}" for i, ok in enumerate(fits) if not ok]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        what = f"the mesh {written(mesh.shape)} does not divide {'; '.join(odd[:3])}{more}"
        if uneven == "refuse":
            raise ValueError(f"{what}: take sizes that do, or keep such axes whole on every device with uneven=whole")
        _LOG.info("%s: whole on every device", what)
    return fitting


def _named(names: Any) -> str:
    return names if isinstance(names, str) else " and ".join(names)


def _ways(path: str, names: Any, mesh: Mesh | AbstractMesh) -> int:
    """In how many parts the mesh axes `names` split an axis."""
    names = () if names is None else (names,) if isinstance(names, str) else names
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        raise ValueError(f"the rule for {path} names the axis {unknown[0]!r}; the mesh has {written(mesh.shape)}")
    return math.prod(mesh.shape[name] for name in names)
