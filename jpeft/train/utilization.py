# SPDX-License-Identifier: Apache-2.0
"""How much of a device training uses: model FLOPs over peak FLOPs, and memory.

The convention: of the weights N of the matrices that a token is multiplied by, each costs it 2 operations forward, 2
for the gradient of what it reads, and 2 for its own gradient. The second are left out below the lowest layer with
something to train, where there is no backward pass; the third where a weight is frozen. So 4 N where the base is
frozen and adapters are everywhere, and 6 N where all is trained. N counts no looked-up table (an output head, tied or
not, it does), of experts those that are used, and of a classifier's head, which one token of a row goes through,
nothing. Adapters' own products are left out, and attention's unless it is said how many keys a token sees. Tokens are
real ones: what is spent on padding is no use.
"""

import math
import re
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .._partition import partition
from .._stack import lowest_trained
from .._walk import Seam, sites
from ..models._sizes import query_width
from .step import CPU_OPTIONS

#: Peak rates of dense bfloat16 products as their makers publish them, FLOP/s of one device, by a part of the device
#: kind's name. The first that fits counts.
PEAKS = (
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("TPU v3", 61.5e12),  # of one core, which is one device
    ("TPU v2", 22.5e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("V100", 125e12),
    ("T4", 65e12),
)
_TABLES = ("Embed", "TokenTable")
#: Tasks whose head one token of a row goes through.
_ONE_A_ROW = ("SEQ_CLS", "IMAGE_CLS", "MULTIPLE_CHOICE")


def flops_per_token(model: Any, task: str, keys: float = 0.0) -> float:
    """Of one update and token, by the convention above.

    Args:
      model: the adapted model, of arrays or of shapes.
      task: PEFT's name of it.
      keys: how many keys a token sees in attention, on average; each costs it a score and a sum, 4 operations a
        dimension of a query forward, and twice that backward.
    """
    trained, total = set(partition(model)[1]), 0.0
    parts = _backward(model, trained)
    for site, size in _matrices(model, task):
        stack = next((path for path in parts if path and site.path.startswith(path + "/")), "")
        inputs = 0.0 if site.type == "Conv" else parts[stack]  # nothing is trained in front of an image
        own = parts[stack] if stack else 1.0
        total += size * (2 + 2 * inputs + 2 * own * _whole(site.path, trained))
    if not keys:
        return total
    layers = {path: math.prod(site.lead) for path in parts for site in sites(model) if _attends(site, path)}
    return total + sum(n * 4 * keys * query_width(model.config) * (1 + 2 * parts[path]) for path, n in layers.items())


def matmul_weights(model: Any, task: str) -> int:
    """Weights that a token is multiplied by: of all projections, a table only where it is the output head as well."""
    return sum(size for _, size in _matrices(model, task))


def _matrices(model: Any, task: str) -> list[tuple[Seam, int]]:
    """The matrices that every token is multiplied by, and their weights, as far as they are used."""
    found = [site for site in sites(model) if site.kind == "projection"]
    tables = [site for site in found if site.type in _TABLES]
    matrices = [site for site in found if site not in tables and (site.lead or task not in _ONE_A_ROW or _first(site))]
    out = [(site, math.prod(_used(site.lead, site.type, model)) * site.d_in * site.d_out) for site in matrices]
    if tables and task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        words = max(tables, key=lambda site: site.d_in)
        if all(site.d_out != words.d_in for site in matrices):  # no head of its own
            out.append((words, words.d_in * words.d_out))
    return out


def _backward(model: Any, trained: set[str]) -> dict[str, float]:
    """Path of every stack -> the share of its layers that the backward pass goes through; "" is what comes after them.

    It ends at the lowest layer that has something to train, or at none where something in front of the stack has.
    """
    found = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    stacks: dict[str, Any] = {path: module for path, module in found.items() if hasattr(module, "stack_size")}
    inputs = ("adapters/", *(site.path + "/" for site in sites(model) if _first(site)))  # a model's own: virtual tokens
    begun = any(path.startswith(inputs) for path in trained)
    shares = {}
    for path in sorted(stacks, key=lambda path: "decoder" in path):
        here, size = any(name.startswith(path + "/") for name in trained), stacks[path].stack_size
        shares[path] = 1.0 if begun else (size - lowest_trained(stacks[path])) / size if here else 0.0
        begun = begun or here
    return shares | {"": float(begun)}


def _first(site: Seam) -> bool:
    """Whether a seam is where a model's input comes in."""
    return not site.lead and (site.kind == "input" or site.type in (*_TABLES, "Conv"))


def _whole(path: str, trained: set[str]) -> bool:
    """Whether a matrix is trained itself, and not only an adapter beside it."""
    copy = re.compile(rf"{re.escape(path)}/adapters/[^/]+/saved/(kernel|embedding)")
    return any(copy.fullmatch(name) for name in trained)


def _attends(site: Seam, stack: str) -> bool:
    return bool(stack) and site.kind == "keys_values" and site.path.startswith(stack + "/")


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s of these devices together: published, or measured on a CPU; None where the kind is not known."""
    if devices[0].platform == "cpu":
        return measured_rate()
    kind = devices[0].device_kind
    return next((peak * len(devices) for name, peak in PEAKS if name in kind), None)


def measured_rate(size: int = 1024, repeats: int = 10) -> float:
    """FLOP/s of a float32 matrix product on the CPU, the fastest of a few: others may take the processor meanwhile."""
    x = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices(backend="cpu")[0])
    product = jax.jit(jnp.dot, compiler_options=CPU_OPTIONS).lower(x, x).compile()
    jax.block_until_ready(product(x, x))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def peak_bytes() -> int:
    """Most memory so far: of the fullest local device where it tells, else of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    if peaks:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _used(lead: tuple[int, ...], kind: str, model: Any) -> tuple[int, ...]:
    """Leading axes, of experts as many as a token is sent to."""
    if kind != "ExpertLinear":
        return lead
    return (*lead[:-1], min(lead[-1], model.config.num_experts_per_tok))
