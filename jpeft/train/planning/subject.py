# SPDX-License-Identifier: Apache-2.0
"""The adapted model, the optimizer's state and a batch, as shapes in their places on a mesh."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ... import models
from ..._adapt import adapt
from ..._masks import optimizer
from ..._mesh import AXES, BATCH_AXES, mesh, parts, sizes, written
from ..._method import Hybrid
from ..._partition import GraphDef, partition
from ..._quantize import quantize
from ..._sharding import shardings
from ...methods import METHODS
from ...models._checkpoint import read_config
from ...models._hub import model_folder
from ..losses import SUMS
from ..mistakes import nearest
from ..optim import make_optimizer
from ..sections.model import SEEING
from ..step import State, begin_shapes
from .request import Request

#: Shapes by path or name, in their places.
Shapes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a step works on.

    Attributes:
      request: what was asked.
      model: the adapted model of shapes.
      graphdef, frozen, state, batch: arguments of the step, in their places.
      tx: the optimizer.
      mesh: of real or of described devices; or the axes alone.
    """

    request: Request
    model: Any
    graphdef: GraphDef
    frozen: Shapes
    state: State
    batch: Shapes
    tx: Any
    mesh: Mesh | AbstractMesh

    @property
    def ways(self) -> int:
        """In how many parts the rows are split."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)


def subject(request: Request, devices: Any = None, updates: int = 1000) -> Subject:
    """The step's arguments for a request, on `devices`, or without any on a mesh of axes alone.

    Args:
      request: what is asked.
      devices: real or described ones, or a mesh of them.
      updates: of the whole run, on which rates and ranks may depend, and no memory does.

    Raises:
      ValueError, FileNotFoundError, CheckpointError: the model, the method or the mesh is not right.
    """
    model = adapted(request)
    graphdef, trainable, frozen = partition(model)
    if not trainable:
        raise ValueError(f"method {request.method} trains nothing of {request.model}")
    grid = devices if isinstance(devices, Mesh) else make_mesh(request, devices)
    places = shardings({**trainable, **frozen}, grid, uneven=request.uneven)
    trainable, frozen = _placed(trainable, places), _placed(frozen, places)
    tx = optimizer(make_optimizer(request.optimizer, updates), model=graphdef)
    state = begin_shapes(tx, trainable, average=request.ema, offload=request.optimizer.offload)
    found = Subject(request, model, graphdef, frozen, state, {}, tx, grid)
    if request.batch % found.ways:
        raise ValueError(
            f"a batch of {request.batch} rows does not divide by the {found.ways} devices along data and fsdp of a "
            f"mesh of {written(grid.shape)}; take a multiple of {found.ways}, or more of the devices along tensor"
        )
    return dataclasses.replace(found, batch=batch(request, NamedSharding(grid, P(None, BATCH_AXES))))


def sums(request: Request) -> Any:
    """The loss of a request, as of `make_step`."""
    return SUMS[request.task] if request.sums is None else request.sums


def adapted(request: Request) -> Any:
    """The adapted model with shapes in the place of arrays."""
    many = tuple(map(_method, request.parts))
    method = many[0] if isinstance(request.method, Mapping) else Hybrid(many)
    return _shapes(request.model, method, request.task, request.dtype, request.remat, request.quantize, request.labels)


@functools.lru_cache(maxsize=32)
def _shapes(name: str, method: Any, task: str, dtype: str, remat: str, scheme: str | None, labels: int | None) -> Any:
    described, key = _config(name), jax.random.key(0)

    def make() -> Any:
        base = models.build(described, task, key=key, dtype=jnp.dtype(dtype), remat=remat, num_labels=labels)
        return adapt(base if scheme is None else quantize(base, scheme), method, key=key)

    return nnx.eval_shape(make)


def make_mesh(request: Request, devices: Any = None) -> Mesh | AbstractMesh:
    """The request's mesh of `devices`, or of axes alone.

    Raises:
      ValueError: it does not fit the machine.
    """
    asked, kinds = request.machine, (AxisType.Auto,) * len(AXES)
    count = sizes(request.axes, asked.count)
    inner, outer = parts(request.axes, asked.count)
    if math.prod(outer) not in (1, asked.slices):
        raise ValueError(
            f"the dcn axes of {request.axes} make up {math.prod(outer)} slices; the machine is {asked}, of "
            f"{asked.slices} (--slices)"
        )
    if devices is None:
        return AbstractMesh(tuple(count.values()), AXES, axis_types=kinds)
    if asked.chip.platform == "cpu" and math.prod(outer) > 1:
        return Mesh(_standing_in(inner, outer, devices), AXES, axis_types=kinds)
    return mesh(request.axes, devices)


def slice_of(device: Any, request: Request) -> int:
    """In which slice, or on which host, a device is; this machine's own CPUs stand in, a share of them for each."""
    found = getattr(device, "slice_index", None)
    if found is not None or jax.process_count() > 1:
        return device.process_index if found is None else found
    return device.id // (request.machine.count // request.machine.slices)


def _standing_in(inner: tuple[int, ...], outer: tuple[int, ...], devices: Any) -> np.ndarray:
    """Devices that are in no slice, in order, laid as those of `slice_of` are."""
    grid = np.asarray(devices, dtype=object).reshape(*outer, *inner)
    order = [axis for pair in zip(range(len(outer)), range(len(outer), 2 * len(outer)), strict=True) for axis in pair]
    return grid.transpose(order).reshape([n * over for n, over in zip(inner, outer, strict=True)])


def batch(request: Request, place: Any = None) -> Shapes:
    """A batch's arrays `[accumulation, rows, ...]`."""
    return {
        name: jax.ShapeDtypeStruct((request.accumulation, *size), jnp.dtype(dtype), sharding=place)
        for name, size, dtype in request.arrays or _usual(request)
    }


def _usual(request: Request) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Name, shape and dtype of what a batch of texts, or of images, holds."""
    if request.task in SEEING:
        pixels = request.batch, *adapted(request).input_shape
        return ("pixel_values", pixels, "float32"), ("labels", pixels[:1], "int32")
    shape = (request.batch, request.seq)
    labels = {
        "CAUSAL_LM": shape,
        "SEQ_2_SEQ_LM": (request.batch, request.target_seq or request.seq),
        "SEQ_CLS": shape[:1],
        "TOKEN_CLS": shape,
        "QUESTION_ANS": (request.batch, 2),
    }
    return ("input_ids", shape, "int32"), ("attention_mask", shape, "int32"), ("labels", labels[request.task], "int32")


def of_images(request: Request) -> Request:
    """A request with rows of as many tokens as its model makes of an image. Raises as `subject`."""
    return request.but(seq=adapted(request).config.num_tokens)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * width(leaf) for leaf in jax.tree.leaves(tree))


def width(leaf: Any) -> int:
    """Bytes of one number of an array."""
    return 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize


def _placed(shapes: Shapes, places: Mapping[str, Any]) -> Shapes:
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in shapes.items()}


def _config(name: str) -> Any:
    """A preset, or what a config.json says."""
    known, path = models.presets(), Path(name)
    if name in known:
        return known[name]
    if path.is_file():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no config.json of a model: {error}") from error
    if path.is_dir() or path.parent != Path("."):
        return dict(read_config(model_folder(name)))
    raise ValueError(f"{name!r} is no preset, folder or config.json; {nearest(name, [*known])}")


def _method(options: Mapping[str, Any]) -> Any:
    options = dict(options)
    kind = options.pop("kind")
    if kind not in METHODS:
        raise ValueError(f"unknown method {kind!r}; {nearest(kind, [*METHODS])}")
    chosen: Any = METHODS[kind]
    known = [field.name for field in dataclasses.fields(chosen)]
    for name in options:
        if name not in known:
            raise ValueError(f"{kind} has no option {name!r}; {nearest(name, known)}")
    return chosen(**options)
