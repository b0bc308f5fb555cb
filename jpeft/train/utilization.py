# SPDX-License-Identifier: Apache-2.0
"""How much of a device training uses: model FLOPs over peak FLOPs, and memory.

The convention: a token costs 4 N floating-point operations where the base is frozen (2 N forward, 2 N backward to the
activations alone) and 6 N where all of it is trained; N counts the weights of the matrices that every token is
multiplied by, so no looked-up table, of experts those that are used, and attention's own products not. Tokens are real
ones: what is spent on padding is no use.
"""

import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._summary import Summary
from .._walk import sites
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


def flops_per_token(model: Any, counts: Summary, task: str) -> float:
    """Of one update and token, by the convention above."""
    return (6 if counts.percent > 50 else 4) * matmul_weights(model, task)


def matmul_weights(model: Any, task: str) -> int:
    """Weights that a token is multiplied by: of all projections, a table only where it is the output head as well."""
    found = [site for site in sites(model) if site.kind == "projection"]
    tables = [site for site in found if site.type in ("Embed", "TokenTable")]
    matrices = [site for site in found if site not in tables]
    total = sum(math.prod(_used(site.lead, site.type, model)) * site.d_in * site.d_out for site in matrices)
    if tables and task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        words = max(tables, key=lambda site: site.d_in)
        if all(site.d_out != words.d_in for site in matrices):  # no head of its own
            total += words.d_in * words.d_out
    return total


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s of these devices together: published, or measured on a CPU; None where the kind is not known."""
    if devices[0].platform == "cpu":
        return measured_rate()
    kind = devices[0].device_kind
    return next((peak * len(devices) for name, peak in PEAKS if name in kind), None)


def measured_rate(size: int = 1024, repeats: int = 3) -> float:
    """FLOP/s of a float32 matrix product on the CPU, the median of a few."""
    x = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices(backend="cpu")[0])
    product = jax.jit(jnp.dot, compiler_options=CPU_OPTIONS).lower(x, x).compile()
    jax.block_until_ready(product(x, x))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


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
