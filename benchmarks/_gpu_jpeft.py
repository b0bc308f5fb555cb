# SPDX-License-Identifier: Apache-2.0
"""jpeft's side of `benchmarks/gpu.py`: every case as a function of its sizes that gives figures."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gpu_cases import RANK, RATE, documents, prompts
from flax import nnx

import jpeft
from jpeft._quantized import Quantized
from jpeft.train.losses import lm_sums
from jpeft.train.step import CPU_OPTIONS, Cost, begin, make_step

DTYPE = jnp.bfloat16
#: What layers keep for the backward pass, the fastest first; the first that fits the device is taken.
POLICIES = ("none", "dots", "full")


def timed(call: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each of `times` calls, after one that is not counted."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def peak_gib() -> float | None:
    """The most of the device that was ever in use; None where it does not tell (a CPU)."""
    found = jax.devices()[0].memory_stats()
    return None if not found else found["peak_bytes_in_use"] / 2**30


def build(config: dict[str, Any], scheme: str | None, remat: str) -> Any:
    """A random model in bfloat16; a quantized one is made of random codes, and its floats are never in memory."""

    def make() -> Any:
        base = jpeft.models.build(config, "CAUSAL_LM", key=jax.random.key(0), dtype=DTYPE, remat=remat)
        return base if scheme is None else jpeft.quantize(base, scheme)

    if scheme is None:
        return make()
    graphdef, state = nnx.split(nnx.eval_shape(make))
    values = nnx.map_state(functools.partial(_random, np.random.default_rng(0)), state)
    return nnx.merge(graphdef, values)


def _random(rng: np.random.Generator, path: tuple[Any, ...], leaf: nnx.Variable[Any]) -> nnx.Variable[Any]:
    """A value of a leaf's shape: any code, and scales and weights of about the size that a trained model has."""
    shape = leaf.get_value()
    if isinstance(leaf, Quantized) and not jnp.issubdtype(shape.dtype, jnp.floating):
        info = jnp.iinfo(shape.dtype)
        return leaf.replace(jnp.asarray(rng.integers(info.min, info.max, shape.shape, shape.dtype, endpoint=True)))
    if isinstance(leaf, Quantized):
        return leaf.replace(jnp.full(shape.shape, 0.02, shape.dtype))
    key = jax.random.key(int(rng.integers(2**31)))
    ones = "norm" in "/".join(map(str, path))
    value = jnp.ones(shape.shape, shape.dtype) if ones else 0.02 * jax.random.normal(key, shape.shape, shape.dtype)
    return leaf.replace(value)


def train(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Updates of LoRA or of everything, with the first of the policies that fits."""
    for remat in case.get("remat", POLICIES):
        try:
            return _train(case, remat, steps) | {"remat": remat}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"remat={remat} does not fit: {str(error).splitlines()[0][:200]}", flush=True)
    raise MemoryError(f"no policy of {case.get('remat', POLICIES)} fits the device")


def _train(case: dict[str, Any], remat: str, steps: int) -> dict[str, Any]:
    method: Any = jpeft.LoRA(rank=RANK, alpha=2 * RANK, targets="all-linear")
    model = build(case["config"], case.get("scheme"), remat)
    model = jpeft.adapt(model, jpeft.FullFineTune() if case["method"] == "full" else method, key=jax.random.key(1))
    graphdef, trainable, frozen = jpeft.partition(model)
    del model
    tx = optax.adamw(RATE)
    update, held = make_step(graphdef, lm_sums, tx), [begin(tx, trainable)]
    del trainable
    batch = {name: jnp.asarray(value)[None] for name, value in documents(case).items()}

    def one() -> Any:
        held[0], metrics = update(held[0], frozen, batch, None)
        return metrics.loss

    return {
        "seconds": timed(one, steps),
        "peak_gib": peak_gib(),
        "compile": update.compile_seconds,
        **_program(update.cost),
    }


def _program(cost: Cost | None) -> dict[str, float]:
    """What the compiled step takes, where the backend tells."""
    return {} if cost is None else {"program_gib": (cost.arguments + cost.temporaries) / 2**30}


def decode(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Greedy generation."""
    model = build(case["config"], None, "none")
    ids = prompts(case)
    start = time.perf_counter()
    call = functools.partial(jpeft.models.generate, model, ids, max_new_tokens=case["new"], bucket=case["prompt"])
    jax.block_until_ready(call())
    compiled = time.perf_counter() - start
    return {"seconds": timed(call, steps), "peak_gib": peak_gib(), "compile": compiled}


def _bank(base: Any, count: int) -> jpeft.Bank:
    models = []
    for slot in range(count):
        method = jpeft.LoRA(rank=RANK, alpha=RANK + slot, targets="all-linear")
        graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(base, method, key=jax.random.key(slot)))
        models.append(jpeft.combine(graphdef, {p: v + 0.01 for p, v in trainable.items()}, frozen))
    return jpeft.bank(models)


def mixed(case: dict[str, Any], steps: int, *, own: bool) -> dict[str, Any]:
    """Greedy generation with one adapter for all rows, or with another one for every row."""
    bank = _bank(build(case["config"], None, "none"), case["rows"])
    ids = jnp.asarray(prompts(case))
    told = {"max_new_tokens": case["new"], "bucket": case["prompt"]}

    def write(model: Any, ids: Any) -> Any:
        return jpeft.models.generate(model, ids, **told)

    if own:
        slots = jnp.arange(case["rows"]) + 1
        program = jax.jit(lambda bank, ids: jpeft.apply_bank(bank, slots, write, ids))
        return {"seconds": timed(lambda: program(bank, ids), steps), "peak_gib": peak_gib()}
    graphdef, trainable, frozen = jpeft.partition(bank.model(1))
    program = jax.jit(lambda trainable, frozen, ids: write(jpeft.combine(graphdef, trainable, frozen), ids))
    return {"seconds": timed(lambda: program(trainable, frozen, ids), steps), "peak_gib": peak_gib()}


def many(case: dict[str, Any], steps: int, *, at_once: bool) -> dict[str, Any]:
    """Updates of several adapters, in one program or one after another; of `adapters` updates together."""
    from jpeft.train.many import begin_many, fix, make_step_many

    base, tx = build(case["config"], None, "none"), optax.adamw(RATE)
    bank = _bank(base, case["adapters"])
    batch = {name: jnp.asarray(value)[None] for name, value in documents(case).items()}
    if at_once:
        fixed: Any = fix(bank, {})
        update, held = make_step_many(bank, lm_sums, tx), [begin_many(tx, bank, fixed)]

        def all_of_them() -> Any:
            held[0], metrics = update(held[0], fixed, batch, None)
            return metrics.loss

        return {"seconds": timed(all_of_them, steps), "peak_gib": peak_gib()}
    graphdef, _, frozen = jpeft.partition(bank.model(1))
    update = make_step(graphdef, lm_sums, tx)
    states = [begin(tx, jpeft.partition(bank.model(slot + 1))[1]) for slot in range(case["adapters"])]

    def one_by_one() -> Any:
        losses = []
        for slot, state in enumerate(states):
            states[slot], metrics = update(state, frozen, batch, None)
            losses.append(metrics.loss)
        return losses

    return {"seconds": timed(one_by_one, steps), "peak_gib": peak_gib()}


def product(case: dict[str, Any], steps: int, *, way: str) -> dict[str, Any]:
    """A product with a quantized matrix and its input's gradient, many in one program, each with codes of its own."""
    d_in, d_out, scheme, layers = case["d_in"], case["d_out"], case["scheme"], case["layers"]
    dtype = jnp.dtype(case.get("dtype", DTYPE))

    def make() -> Any:
        module = nnx.Linear(d_in, d_out, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        module.kernel = nnx.Param(jnp.zeros((layers, d_in, d_out), dtype))
        return jpeft.quantize(module, scheme, targets=".*")

    graphdef, state = nnx.split(nnx.eval_shape(make))
    module = nnx.merge(graphdef, nnx.map_state(functools.partial(_random, np.random.default_rng(0)), state))
    x = jax.random.normal(jax.random.key(0), (case["rows"], d_in), dtype)

    def both(module: Any, x: Any) -> Any:
        def step(total: Any, one: Any) -> Any:
            y, pull = jax.vjp(lambda x: one(x), x + total)
            return pull(y)[0] * jnp.asarray(1e-3, dtype), None

        return jax.lax.scan(step, jnp.zeros_like(x), module)[0]

    options: Any = CPU_OPTIONS if jax.default_backend() == "cpu" else None
    with jpeft.quantized_products(way):
        program = jax.jit(both, compiler_options=options).lower(module, x).compile()
    return {"seconds": timed(lambda: program(module, x), steps), "peak_gib": peak_gib()}


SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train,
    "decode": decode,
    "one adapter": functools.partial(mixed, own=False),
    "an adapter a row": functools.partial(mixed, own=True),
    "at once": functools.partial(many, at_once=True),
    "one by one": functools.partial(many, at_once=False),
    "xla": functools.partial(product, way="xla"),
    "pallas": functools.partial(product, way="pallas"),
}


def versions() -> dict[str, str]:
    """What ran, and on what."""
    import flax
    import jaxlib

    device = jax.devices()[0]
    found = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__, "jpeft": jpeft.__version__}
    return {"device": f"{device.device_kind} ({device.platform})", **found}
