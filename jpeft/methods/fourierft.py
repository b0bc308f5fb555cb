# SPDX-License-Identifier: Apache-2.0
"""FourierFT: an update with few frequencies (Gao et al. 2024, https://arxiv.org/abs/2405.03003).

    y = x W + b + x ΔW        ΔW = scaling * Re IFFT2(S)        S [d_in, d_out], zero but at n places that hold c [n]

The places are random and frozen, the n numbers there are all that is trained. ΔW of a layer is as large as its kernel;
it is made again in the backward pass, never kept.

Where the places are follows from `location_key` and the sizes alone, not from the key of `adapt`, so modules of one
size share them. They are those that PEFT draws from the same seed, by torch's generator (of kernels with 214,748,364
entries or more, NumPy's), and are kept with the adapter.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from .. import _mersenne, seams
from .._fields import one_of, positive, selection, whole
from .._method import Method, Site, Start, Targets, wide
from .._scope import fold_path, made_again
from ._default_targets import default_targets


@dataclasses.dataclass(frozen=True)
class FourierFT(Method):
    """Discrete Fourier transform of a sparse spectrum, with PEFT's meanings and defaults.

    Args:
      n_frequency: trained entries of the spectrum, per projection.
      scaling: factor of the update; large, as the inverse transform divides by the size of the kernel.
      targets: what to adapt: a regular expression for the whole name, a list of names or suffixes, `"all-linear"`, or
        None for the model type's default.
      init: of the spectrum: `"normal"` (the paper's and PEFT's: it does not start as the base) or `"zero"`.
      location_key: seed of the places, as PEFT's `random_loc_seed`.
      layers: indices of the layers to adapt; None for all.
      exclude: names left out of `targets`, by the same rules.
      modules_to_save: modules trained whole, as a copy; None trains the head of a classification task, () nothing.

    Example:
      >>> jpeft.FourierFT(n_frequency=1000, targets=["q_proj", "v_proj"])
    """

    kind: ClassVar[str] = "fourierft"

    n_frequency: int = 1000
    scaling: float = 150.0
    targets: Any = None
    init: str = "normal"
    location_key: int = 777
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        selection(self)
        whole("FourierFT", "n_frequency", self.n_frequency)
        whole("FourierFT", "location_key", self.location_key, least=0)
        one_of("FourierFT", "init", self.init, ("normal", "zero"))
        positive("FourierFT", "scaling", self.scaling)

    def select(self, model_type: str | None) -> Targets:
        targets = default_targets("FourierFT", self.targets, model_type)
        return Targets(targets, self.exclude, self.layers, self.modules_to_save)

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        size, n = site.d_in * site.d_out, self.n_frequency
        if n > size:
            raise ValueError(
                f"{site.path} has {size} weights, and FourierFT's n_frequency is {n}; take fewer, or leave it out of "
                "targets"
            )
        dtype = wide(getattr(base, seams.projection(base).kernel).dtype)
        shape, places = (*site.lead, n), self.places(site)
        zero = jnp.zeros(shape, dtype)
        c = jax.random.normal(fold_path(key, "c"), shape, dtype) if self.init == "normal" else zero
        return Start({"c": c}, {"places": jnp.broadcast_to(jnp.asarray(places, jnp.int32), shape)})

    def after(self, adapter: Any, base: Any, y: jax.Array, *inputs: Any) -> Float[Array, "..."]:
        projection, site, x = seams.projection(base), adapter.site, jnp.asarray(inputs[0])
        if not isinstance(projection, seams.Lookup):
            x = x.astype(wide(x.dtype))
        c = adapter.c[...] if all(site.active) else jnp.where(jnp.array(site.active)[adapter.layer], adapter.c[...], 0)
        product = jax.checkpoint(lambda x, c, at: projection.contract(base, x, _change(c, at, site)))
        delta = product(made_again(x), c * self._factor(adapter), adapter.places[...])  # [..., d_out]
        return (y + projection.emit(base, delta)).astype(y.dtype)

    def attend(self, adapter: Any, base: Any, y: jax.Array, query: jax.Array) -> Float[Array, "..."]:
        """By transforms of each query and of its logits: a change of the whole table is never made."""
        site, places = adapter.site, adapter.places[...]
        waves = _inverse(jnp.asarray(query, wide(query.dtype)))[..., places % site.d_out]
        waves = waves * (adapter.c[...] * self._factor(adapter)).reshape((1,) * (query.ndim - 1) + (-1,))
        spectrum = jnp.zeros((*query.shape[:-1], site.d_in), waves.dtype).at[..., places // site.d_out].add(waves)
        return (y + _inverse(spectrum).real).astype(y.dtype)

    def merge(self, adapter: Any, base: Any) -> Mapping[str, jax.Array]:
        projection, site = seams.projection(base), adapter.site
        factor = self._factor(adapter) * jnp.array(site.active).reshape(*site.lead, 1)
        kernel, delta = projection.read(base), _change(adapter.c[...] * factor, adapter.places[...], site)
        return {projection.kernel: projection.unmatrix(base, kernel.astype(wide(kernel.dtype)) + delta)}

    def padded(self, adapter: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Method, Mapping[str, Any]]:
        """As many numbers for all, each with its factor: those that are padded have 0, and so learn nothing."""
        lead, most = adapter.site.lead, shapes["c"][-1]
        factor = jnp.broadcast_to(jnp.asarray(self._factor(adapter), jnp.float32), (*lead, self.n_frequency))
        factor = jnp.pad(factor, [(0, 0)] * len(lead) + [(0, most - self.n_frequency)])
        return dataclasses.replace(self, n_frequency=most, scaling=1.0, location_key=0), {"factor": factor}

    def depends_on_layer(self, site: Site) -> bool:
        return not all(site.active)

    def count(self, site: Site) -> tuple[int, int]:
        places = sum(site.active)
        return places * self.n_frequency, places * site.d_in * site.d_out

    def places(self, site: Site) -> np.ndarray:
        """Where in the kernel's matrix, read row by row, the numbers of a layer stand: `[n_frequency]`."""
        size = site.d_in * site.d_out
        if size >= _mersenne.LONGEST:
            return np.random.default_rng(self.location_key).choice(size, self.n_frequency, replace=False, shuffle=False)
        drawn = _mersenne.permutation(self.location_key, size, self.n_frequency)  # of a matrix [d_out, d_in]
        return drawn % site.d_in * site.d_out + drawn // site.d_in

    def _factor(self, adapter: Any) -> Any:
        """The scaling; in a slot of a bank a leaf `[*lead, n]`."""
        return adapter.factor[...] if hasattr(adapter, "factor") else self.scaling


def _change(c: jax.Array, places: jax.Array, site: Site) -> jax.Array:
    """Re IFFT2 of the spectrum with `c` `[*lead, n]` at `places`: `[*lead, d_in, d_out]`, in float32 or more."""
    size = site.d_in * site.d_out
    spread = jnp.vectorize(lambda c, at: jnp.zeros(size, c.dtype).at[at].add(c), signature="(n),(n)->(s)")
    spectrum = spread(c, places).reshape(*c.shape[:-1], site.d_in, site.d_out)
    return _as_it_lies(jnp.fft.ifft2(_as_it_lies(spectrum + 0j))).real.astype(c.dtype)


def _inverse(x: jax.Array) -> jax.Array:
    """IFFT along the last axis."""
    return jnp.fft.ifft(_as_it_lies(x + 0j))


def _as_it_lies(x: jax.Array) -> jax.Array:
    """`x`, and its gradient, with the last axis innermost: a CPU transforms no other, and a mesh may turn them."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
