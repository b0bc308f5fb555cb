# SPDX-License-Identifier: Apache-2.0
"""The subjects of the contracts: every method times every kind of model.

A new method joins by one line in `METHODS` (lines.py), a new family by one in `MODELS` (models.py).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import subjects
from contracts.lines import METHODS as METHODS
from contracts.lines import Line
from contracts.models import KNOWN, VOCAB, Model

import jpeft

KEY = jax.random.key(0)


#: The compiler's quickest way: there is much to compile here, and little to run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """One method on one model."""

    method: str
    model: str

    @property
    def row(self) -> Model:
        return KNOWN[self.model]

    @property
    def line(self) -> Line:
        return METHODS[self.method]

    @property
    def base(self) -> Any:
        """The plain model; not to be changed."""
        return _base(self.model)

    @property
    def filled(self) -> Any:
        """The adapted model with numbers in every trained leaf; not to be changed."""
        return _filled(self)

    def fresh(self, key: jax.Array = KEY, targets: Any = None, base: Any = None) -> Any:
        """The adapted model at its start."""
        method = self.line.make(targets or self.row.targets)
        return jpeft.adapt(self.base if base is None else base, method, key=key)

    def run(self, model: Any, *inputs: Any, **options: Any) -> np.ndarray:
        """Outputs under jit, as float32; inputs as of `Model.run`."""
        graphdef, trainable, frozen = jpeft.partition(model)
        return np.asarray(_run(graphdef, self.model, trainable, frozen, inputs, options), np.float32)

    def loss(self, graphdef: jpeft.GraphDef) -> Callable[..., jax.Array]:
        """(trainable, frozen, ids, key) -> a loss with every output in it, under dropout where the method has any."""

        def loss(trainable: Any, frozen: Any, ids: Any, key: jax.Array) -> jax.Array:
            with jpeft.dropout_key(key):
                out = self.row.run(jpeft.combine(graphdef, trainable, frozen), ids)
            weights = np.random.default_rng(5).standard_normal(out.shape).astype(out.dtype)
            return (weights * jnp.tanh(out)).sum()

        return loss

    def step(self, model: Any, ids: Any, key: jax.Array) -> Any:
        """Loss and gradients of `model` under jit."""
        graphdef, trainable, frozen = jpeft.partition(model)
        return _step(self, graphdef, trainable, frozen, ids, key)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _run(graphdef, name, trainable, frozen, inputs, options):
    return KNOWN[name].run(jpeft.combine(graphdef, trainable, frozen), *inputs, **options)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _step(case, graphdef, trainable, frozen, ids, key):
    return jax.value_and_grad(case.loss(graphdef))(trainable, frozen, ids, key)


@functools.cache
@jax.ensure_compile_time_eval()  # one that is first asked for within a trace is kept as well
def _base(model: str) -> Any:
    return KNOWN[model].build()


@functools.cache
def _filled(case: Case) -> Any:
    return subjects.fill(case.fresh(), scale=0.2)


CASES = [Case(method, model) for method, line in METHODS.items() for model in line.on]


def kind_of(line: Line) -> str:
    """Its method's kind, of a hybrid the last one's."""
    method = line.make(["up"])
    return getattr(method, "methods", (method,))[-1].kind


#: Of every method the first line, on one model.
_FIRST_LINES = {kind_of(line): (name, line.fast[0]) for name, line in reversed(METHODS.items())}
FIRST = [Case(*case) for case in _FIRST_LINES.values()]
IDS = np.random.default_rng(0).integers(0, VOCAB, (3, 6))
