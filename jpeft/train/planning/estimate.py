# SPDX-License-Identifier: Apache-2.0
"""Memory, FLOPs and time of a step by shape.

What stays is counted exactly: weights, adapters, the optimizer's state, by the shapes of their parts on one device. So
is what autodiff keeps of the forward pass, which is read off the traced derivative. What comes and goes within a layer
and within the head is a formula (`_working`), the only place where a compiler's choices are guessed.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..._graft import ADAPTERS
from ..._mesh import AXES
from ..._partition import combine, partition
from ..._quantized import QuantizedKernel
from ..._scope import scope
from ..._summary import summary
from ...models._attention import block_rows
from ...models._sizes import query_heads, stream_width
from .._head import CHUNK_LOGITS
from ..sections import Optimizer
from ..step import make_step
from .devices import Chip, Machine
from .request import Request
from .subject import Subject, adapted, batch, device_bytes, subject, sums, width
from .trace import Kept, kept, product_flops

#: Tasks of models with an output head of as many logits as words.
WRITING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
#: Arrays of a kernel's size in float32 that unpacking NF4 takes on a CPU, in the compiled programs of two models.
UNPACKING = 8
#: (number of layers, what they keep) of every stack.
_Stacks = list[tuple[int, list[jax.ShapeDtypeStruct]]]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, of a step's parts at its fullest.

    Attributes:
      weights: the frozen base, codes and scales where it is quantized.
      adapters: what is trained.
      optimizer: the optimizer's state, and a moving average where one is kept.
      gradients: of what is trained.
      activations: what all layers keep for the backward pass.
      working: what one layer and the head need while they run: its own arrays, gathered weights, logits.
      cache: keys and values for generation, which is no part of the step's total.
      fetched: the optimizer's state where it lies in the host's memory: there while an update is made, when what the
        layers kept is gone.
      host: bytes of the host's memory for it, and for what layers keep there (`remat: offload`), of this device's part.
    """

    weights: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    working: int
    cache: int = 0
    fetched: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Of the step."""
        stays = self.weights + self.adapters + self.optimizer + self.gradients
        return stays + max(self.activations + self.working, self.fetched)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step by shape.

    Attributes:
      memory: of one device.
      base, trainable: parameters.
      flops: products and sums of the step's matrix products, on all devices.
      convention: the same by the rule that papers use: 4 N a token where the base is frozen, 6 N where all is trained.
    """

    request: Request
    memory: Memory
    base: int
    trainable: int
    flops: float
    convention: float

    @property
    def fits(self) -> bool | None:
        """Whether the step's memory is there; None where nobody said how much is."""
        has = self.request.machine.chip.memory
        return None if has is None else self.memory.total <= has

    @property
    def seconds(self) -> float | None:
        """Of a step: products at `share` of the peak, or reading the base's weights, whichever takes longer."""
        chip, count = self.request.machine.chip, self.request.machine.count
        if chip.flops is None or chip.bandwidth is None:
            return None
        passes = 3 if self.request.remat == "full" else 2
        read = passes * self.request.accumulation * self.memory.weights / chip.bandwidth
        return max(self.flops / (count * chip.flops * self.request.share), read)

    @property
    def rate(self) -> float | None:
        """Tokens a second, on all devices."""
        return None if self.seconds is None else self.request.tokens / self.seconds


def estimate(request: Request, found: Subject | None = None) -> Estimate:
    """What a step takes, by shape.

    Raises:
      ValueError: as `subject`.
    """
    found = subject(request) if found is None else found
    counts = summary(found.model)
    with scope(platform=request.machine.chip.platform):
        step = make_step(found.graphdef, sums(request), found.tx, ema=0.9 if request.ema else None)
        flops = product_flops(lambda *given: step.update(*given, None), found.state, found.frozen, batch(request))
    return Estimate(
        request=request,
        memory=memory(found),
        base=counts.base,
        trainable=counts.trainable,
        flops=flops,
        convention=(6.0 if request.full else 4.0) * counts.base * request.tokens,
    )


def memory(found: Subject) -> Memory:
    """The parts of a step's memory on one device.

    A CPU computes bfloat16 in float32: it keeps and works as a step in float32 does, beside a copy of what
    is multiplied of the base: of a table only where it is the output head as well.
    """
    request, own = found.request, _memory(found)
    if request.machine.chip.platform != "cpu" or request.dtype != "bfloat16":
        return own
    wide = _memory(subject(request.but(dtype="float32"), found.mesh if isinstance(found.mesh, Mesh) else None))
    tied = request.task in WRITING and not hasattr(found.model, "lm_head")
    multiplied = (leaf for path, leaf in found.frozen.items() if tied or not path.endswith("/embedding"))
    copies = 2 * sum(device_bytes(leaf) for leaf in multiplied if leaf.dtype == jnp.dtype(request.dtype))
    return dataclasses.replace(own, activations=wide.activations, working=wide.working + copies)


def _memory(found: Subject) -> Memory:
    request = found.request
    trainable, state = device_bytes(found.state.trainable), device_bytes(found.state.optimizer)
    own_memory = request.machine.chip.platform != "cpu"  # whose memory is the host's
    away = request.optimizer.offload and own_memory
    saved, moved = _kept(found, request)
    if not own_memory:
        saved, moved = saved + moved, []
    bare = saved if request.remat == "none" else _kept(found, request.but(remat="none"))[0]
    layers = _layers(found.model)
    anew = _anew(_stacked(bare, layers), _stacked(saved, layers), found)
    one_moved = max((_bytes(part) // n for n, part in _stacked(moved, layers)), default=0)
    return Memory(
        weights=device_bytes(found.frozen),
        adapters=trainable,
        optimizer=(0 if away else state) + device_bytes(found.state.average),
        gradients=trainable * (1 if request.accumulation == 1 else 2),
        activations=_bytes(saved),
        working=_working(found, anew) + 2 * one_moved,  # one layer's in use, and the next one's on their way
        cache=_cache(found),
        fetched=state if away else 0,
        host=(state if away else 0) + _bytes(moved),
    )


def _anew(bare: _Stacks, saved: _Stacks, found: Subject) -> int:
    """What a layer computes anew in the backward pass, of what it keeps without rematerialisation and of what with it.

    On a CPU that is less what it keeps; and of factors beside a projection one array more, as wide as the layer's
    widest, for the product that is their gradient.
    """
    remat, cpu = found.request.remat, found.request.machine.chip.platform == "cpu"
    one_layer = 0 if remat == "none" else max((_bytes(part) // n for n, part in bare), default=0)
    if not cpu:
        return one_layer
    one_kept = max((_bytes(part) // n for n, part in saved), default=0)
    widest = max((_bytes([x]) // n for n, part in bare for x in part), default=0)
    return max(one_layer - one_kept, 0) + (widest if _beside_kernels(found) else 0)


def _beside_kernels(found: Subject) -> bool:
    """Whether leaves of a method's own are trained beside a kernel."""
    bases = {path.rpartition("/kernel")[0] for path in found.frozen if "/kernel" in path}
    own = (path for path in found.state.trainable if f"/{ADAPTERS}/" in path and "/saved/" not in path)
    return any(path.partition(f"/{ADAPTERS}/")[0] in bases for path in own)


def _working(found: Subject, anew: int) -> int:
    """What a layer needs beside what it keeps, and the head: compilers lay no loop's memory over another's.

    A layer computes `anew` bytes in the backward pass. Of its weights the two largest are whole along `fsdp` at a time,
    one in use and the next on its way; of quantized ones, one is there in float32, on accelerators when no scores are.
    The head's kernel is whole when no layer's is.
    """
    leaves, split = _leaves(found), found.mesh.shape["fsdp"]
    kernels = [_along_fsdp(leaves[path]) // count for count, paths in _layers(found.model) for path in paths]
    gathered = sum(sorted(kernels)[-2:]) if split > 1 else 0
    decoded, beside = _decoded(found), max(_head(found), _scores(found))
    cpu = found.request.machine.chip.platform == "cpu"
    layer = anew + gathered + (decoded + beside if cpu else max(decoded, beside))
    return max(layer, _whole_head(found) + _head(found))


def _along_fsdp(leaf: Any) -> int:
    """Bytes of a placed leaf that is made whole along `fsdp`, on one device."""
    split = leaf.sharding.mesh.shape["fsdp"] if "fsdp" in leaf.sharding.spec else 1
    return device_bytes(leaf) * split


def _decoded(found: Subject) -> int:
    """The largest quantized kernel of a layer in float32; on a CPU with all that is made on the way to it."""
    arrays = UNPACKING if found.request.machine.chip.platform == "cpu" else 1
    kernels = [module for _, module in nnx.iter_modules(found.model) if isinstance(module, QuantizedKernel)]
    largest = max((4 * math.prod(k.shape[len(k.lead) :]) for k in kernels), default=0)
    return arrays * largest // found.mesh.shape["tensor"]


def _head(found: Subject) -> int:
    """Logits of a chunk in float32 with their derivative, the same in the base's dtype, and the head's own weights."""
    request, vocab = found.request, getattr(found.model.config, "vocab_size", 0)
    if request.task not in WRITING:
        return 0
    tokens = found.mesh.shape["sequence"]
    rows = request.batch // found.ways * batch(request)["labels"].shape[-1] // tokens
    logits = min(rows * vocab, CHUNK_LOGITS // (found.ways * tokens))
    return logits * 10 // found.mesh.shape["tensor"]


def _whole_head(found: Subject) -> int:
    """The head's kernel, or the table that is tied to it, as it is gathered along `fsdp`, in the base's dtype."""
    request, vocab = found.request, getattr(found.model.config, "vocab_size", 0)
    if request.task not in WRITING or found.mesh.shape["fsdp"] == 1:
        return 0
    tables = (leaf for leaf in _leaves(found).values() if leaf.ndim == 2 and vocab in leaf.shape)
    words = max((_along_fsdp(leaf) // leaf.dtype.itemsize for leaf in tables), default=0)
    return words * jnp.dtype(request.dtype).itemsize


def _scores(found: Subject) -> int:
    """Scores of a block of a device's own queries with all keys in float32, their exponentials, and their gradients."""
    request, ways = found.request, found.mesh.shape["sequence"]
    platform, own = request.machine.chip.platform, request.seq // ways
    heads = -(-query_heads(found.model.config) // found.mesh.shape["tensor"])
    block = min(own, block_rows(own, platform))
    pairs = _pairs_at_once(request, own, block, ways) if platform == "cpu" else 3 * block * request.seq
    return 4 * (request.batch // found.ways) * heads * pairs


def _pairs_at_once(request: Request, own: int, block: int, ways: int) -> int:
    """Pairs of a query and a key whose numbers a program for a CPU holds, which has all blocks of queries at once.

    Where a text is read from the left, a block has no scores with what comes after it. Where a row's tokens are split
    and a layer is computed anew, one of the three arrays takes the place of its other ones.
    """
    blocks = -(-own // block)
    arrays = 3 if request.remat == "none" or ways == 1 else 2
    from_left = request.task == "CAUSAL_LM" and ways == 1
    return arrays * own * request.seq * (blocks + 1) // (2 * blocks) if from_left else arrays * own * request.seq


def _kept(found: Subject, request: Request) -> tuple[list[jax.ShapeDtypeStruct], list[jax.ShapeDtypeStruct]]:
    """What one device keeps of a forward pass over its rows, itself and in the host's memory."""
    platform = request.machine.chip.platform
    one = Machine(Chip(platform, platform, None, None, None, ""), 1)
    rows, tokens = request.batch // found.ways, found.mesh.shape["sequence"]
    own = tuple((name, (shape[0] // found.ways, *shape[1:]), dtype) for name, shape, dtype in request.arrays)
    alone = request.but(machine=one, mesh=None, batch=rows, arrays=own, generate=0, share=1.0, optimizer=Optimizer())
    tensor, d_model = found.mesh.shape["tensor"], stream_width(found.model.config)
    weights = {leaf.shape: leaf.sharding.shard_shape(leaf.shape) for leaf in _leaves(found).values() if leaf.ndim > 1}

    def own_part(x: Kept) -> jax.ShapeDtypeStruct:
        part = _of_tokens(x, request.seq, tokens)
        if part.shape in weights:  # weights in the products' dtype lie as they themselves do
            return jax.ShapeDtypeStruct(weights[part.shape], part.dtype)
        return part if part.shape and part.shape[-1] == d_model else _split(part, tensor)

    everything = _traced(alone, tokens)
    return [own_part(x) for x in everything if not x.on_host], [own_part(x) for x in everything if x.on_host]


def _of_tokens(x: Kept, seq: int, ways: int) -> jax.ShapeDtypeStruct:
    """What a device along `sequence` has of an array: its own tokens, unless attention needs those of all."""
    whole = jax.ShapeDtypeStruct(x.shape, x.dtype)
    axes = [axis for axis, size in enumerate(x.shape) if size >= seq] or ([0] if x.shape[:1] == (ways,) else [])
    axes = [len(x.shape) - 4] if x.in_parts else axes
    if ways == 1 or x.gathered or not axes:
        return whole
    return jax.ShapeDtypeStruct((*x.shape[: axes[0]], -(-x.shape[axes[0]] // ways), *x.shape[axes[0] + 1 :]), x.dtype)


def _leaves(found: Subject) -> dict[str, Any]:
    return {**found.frozen, **found.state.trainable}


@functools.lru_cache(maxsize=256)
def _traced(request: Request, ways: int) -> list[Kept]:
    """What is kept of a forward pass on one device, or on those along `sequence`; the same on every chip of a platform.

    Of these each has the queries of its own part of a row, so that the program is another one.
    """
    graphdef, *leaves = partition(adapted(request))
    along = AbstractMesh((1, 1, ways, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    place = NamedSharding(along, P())
    rows = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch(request).items()}
    key = jax.eval_shape(lambda: jax.random.key(0)) if request.dropout else None
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (*leaves, rows, key))

    def loss(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return sums(request)(combine(graphdef, trainable, frozen), batch, key, 1)[0]

    with scope(platform=request.machine.chip.platform):
        return kept(loss, *arguments)


def _split(x: jax.ShapeDtypeStruct, tensor: int) -> jax.ShapeDtypeStruct:
    """An array with the largest axis that divides over the devices along `tensor` split over them."""
    axes = [i for i, n in enumerate(x.shape) if n % tensor == 0 and n >= tensor]
    if tensor == 1 or not axes:
        return x
    axis = max(axes, key=lambda i: x.shape[i])
    return jax.ShapeDtypeStruct((*x.shape[:axis], x.shape[axis] // tensor, *x.shape[axis + 1 :]), x.dtype)


def _layers(model: Any) -> list[tuple[int, list[str]]]:
    """(number of layers, paths of the leaves) of every stack."""
    found = []
    for path, module in nnx.iter_modules(model):
        size = getattr(module, "stack_size", None)
        if size is not None:
            _, flat = nnx.graph.flatten(module)
            found.append((size, ["/".join(map(str, (*path, *leaf))) for leaf in flat.paths]))
    return found


def _stacked(arrays: list[jax.ShapeDtypeStruct], layers: list[tuple[int, list[str]]]) -> _Stacks:
    """(number of layers, what they keep) of every stack."""
    return [(count, [x for x in arrays if x.ndim > 1 and x.shape[0] == count]) for count, _ in layers]


def _cache(found: Subject) -> int:
    """Keys and values of all rows, on one device: rows are split over `data` and `fsdp`, heads over `tensor`."""
    request, tensor = found.request, found.mesh.shape["tensor"]
    if not request.generate:
        return 0
    made = nnx.eval_shape(lambda model: model.cache(request.batch // found.ways, request.generate), found.model)
    keys = jax.tree.leaves(made.kv)  # [layers, rows, kv_heads, slots, d_head]
    return _bytes(keys) // (tensor if keys[0].shape[2] % tensor == 0 else 1)


def _bytes(arrays: Any) -> int:
    return sum(math.prod(x.shape) * width(x) for x in arrays)
