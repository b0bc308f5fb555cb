# SPDX-License-Identifier: Apache-2.0
"""Adapters as what they change in the base's weights: added, negated, put to the vote, turned into LoRAs.

  both = jpeft.combine_adapters([(model_a, 1.0), (model_b, 0.5)])                # dW = dW_a + dW_b / 2, exactly
  less = jpeft.combine_adapters([(model_a, 1.0), (model_b, -1.0)], "svd", rank=8)
  lora, errors = jpeft.as_lora(model, energy=0.99)

All of it acts on dW, never on the factors of a LoRA's: A1 B1 + A2 B2 is not (A1 + A2)(B1 + B2). So scales, rsLoRA,
patterns, biases, and methods that are no LoRA but have a merged form, come out right.
"""

import collections
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._adapt import adapt, strip
from ._bank import _same
from ._change import Change, Product, change, exact, factored, only, stacked, truncated
from ._graft import ADAPTERS
from ._partition import Leaves, combine, partition
from ._scope import fold_path
from ._task_vectors import Vector, drop, elect, total, trim
from ._walk import Found, modules, own_leaves
from .methods import METHODS

#: What `how=` may say, and whether the result is exact in the factors.
EXACT, CUT, SPARSE = ("linear", "cat"), ("svd",), ("ties", "dare_linear", "dare_ties", "magnitude_prune")

Kernels = Mapping[tuple[str, int], Product]


def combine_adapters(
    adapters: Sequence[tuple[Any, float]],
    how: str = "linear",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    key: jax.Array | None = None,
    over: str = "model",
    name: str = "lora",
) -> Any:
    """The base with one LoRA that changes it by a combination of what several adapters do.

    Args:
      adapters: (adapted model, weight) pairs; a weight below 0 takes away. In the place of a model its trainable leaves
        may stand, if another is a model of the same make.
      how: of dW_i, and of what else is trained (biases, heads):
        `"linear"`, `"cat"`: the sum of w_i dW_i, exactly, by as many columns as all have together;
        `"svd"`: the same, cut to `rank` or `energy`;
        `"magnitude_prune"`: the sum of w_i trim(dW_i), which keeps the `density` largest entries of each;
        `"ties"`: of every entry of w_i trim(dW_i), the mean of those that have the sign of their sum;
        `"dare_linear"`, `"dare_ties"`: the same two, but entries are kept at random, and divided by `density`.
      rank, energy: columns of the result, and the part of the squared singular values that they keep at least. Every
        `how` but the exact ones needs one of them.
      density: part of the entries that is kept, in (0, 1].
      key: of what DARE drops.
      over: whether entries are trimmed over the `"model"`, as in the paper, or over each `"matrix"`, as in PEFT.
      name: of the LoRA.

    Raises:
      ValueError: bases differ, a method has no merged form, or an option is missing, useless or out of range.

    Example:
      >>> model = jpeft.combine_adapters([(sentiment, 1.0), (toxic, -0.5)], "ties", density=0.2, rank=16)
    """
    _check(adapters, how, rank, energy, density, key, over)
    models, weights = _models([adapter for adapter, _ in adapters]), [float(weight) for _, weight in adapters]
    changes = [change(model) for model in models]
    if how in SPARSE:
        kernels, leaves = _sparse(changes, weights, how, density, key, over)  # type: ignore[arg-type]
    else:
        kernels = {at: exact(stacked(_weighted(changes, weights, at))) for at in _keys(c.kernels for c in changes)}
        leaves = {
            path: sum(
                (w * c.leaves[path] for c, w in zip(changes, weights, strict=True) if path in c.leaves), np.zeros(())
            )
            for path in _keys(c.leaves for c in changes)
        }
    if how not in EXACT:
        kernels = {at: truncated(product, rank, energy)[0] for at, product in kernels.items()}
    return _with_lora(strip(models[0]), name, kernels, leaves)


def as_lora(
    model: nnx.Module, name: str | None = None, *, rank: int | None = None, energy: float | None = None
) -> tuple[Any, dict[str, float]]:
    """The base with one plain LoRA (alpha = rank) that changes its weights as the adapters of `model` do.

    Copies of biases and modules that are trained whole stay what they are.

    Args:
      model: adapted by methods that have a merged form.
      name: of the one adapter that is meant, the others being left out; None for what all do together.
      rank: columns at most; None for as many as the change has, which then is exact in float32.
      energy: instead, the least part of the squared singular values to keep; ranks then differ between modules.

    Returns:
      The model, and the relative error (of norms) of dW by name of the module.

    Raises:
      ValueError: a method has no merged form; rank or energy is out of range; there is no such adapter.

    Example:
      >>> lora, errors = jpeft.as_lora(model, energy=0.99)
    """
    _check_size(rank, energy)
    model = model if name is None else only(model, name)
    found = change(model)
    if not found.kernels:
        raise ValueError(
            "the model has no adapter on a projection, so there is nothing that a LoRA could do in its place"
        )
    kernels, errors = {}, {}
    for at, product in found.kernels.items():
        whole = rank is None and energy is None
        kernels[at], errors[at] = (exact(product), 0.0) if whole else truncated(product, rank, energy)
    lora = _with_lora(strip(model), name or "lora", kernels, found.leaves)
    names = {f.path: f.names for f in modules(lora)}
    return lora, {names[path][layer]: error for (path, layer), error in errors.items()}


def average(models: Sequence[nnx.Module], weights: Sequence[float] | None = None) -> Any:
    """The adapted model whose trainable leaves are the weighted sum of those of `models`, leaf by leaf.

    For adapters of any method that were trained from one start; the average of two LoRAs' factors is not the LoRA of
    their average (`combine_adapters`).

    Args:
      models: of the same method, options and places, on one base.
      weights: one for each, used as they are; None for the mean.

    Raises:
      ValueError: the models are of different makes, or differ in what is not trained.

    Example:
      >>> model = jpeft.average([seed_0, seed_1, seed_2])
    """
    if not models:
        raise ValueError("average needs at least one model")
    weights = [1 / len(models)] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(models):
        raise ValueError(f"got {len(weights)} weights for {len(models)} models")
    parts = [partition(model) for model in models]
    graphdef, first, frozen = parts[0]
    for i, (other, _, kept) in enumerate(parts[1:], 1):
        if other != graphdef:
            raise ValueError(f"models 0 and {i} differ in method, options or places")
        odd = [path for path in frozen if not _same(frozen[path], kept[path])]
        if odd:
            raise ValueError(f"models 0 and {i} differ in {odd[0]}, which is not trained, and so cannot be averaged")
    summed = {
        path: np.sum([w * np.asarray(t[path], np.float64) for w, (_, t, _) in zip(weights, parts, strict=True)], axis=0)
        for path in first
    }
    return combine(graphdef, {path: jnp.asarray(v, first[path].dtype) for path, v in summed.items()}, frozen)


def _check(adapters: Any, how: str, rank: Any, energy: Any, density: Any, key: Any, over: str) -> None:
    if not adapters or any(not isinstance(pair, tuple) or len(pair) != 2 for pair in adapters):
        raise ValueError("combine_adapters takes (adapted model, weight) pairs, at least one")
    for _, weight in adapters:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"a weight must be a finite number, got {weight!r}")
    if how not in EXACT + CUT + SPARSE:
        raise ValueError(f"how must be one of {', '.join(EXACT + CUT + SPARSE)}; got {how!r}")
    if over not in ("model", "matrix"):
        raise ValueError(f"over must be model or matrix, got {over!r}")
    _check_size(rank, energy)
    if (rank is None and energy is None) != (how in EXACT):
        raise ValueError(
            f"how={how!r} is exact, and has the ranks of all adapters together; to cut it use how='svd'"
            if how in EXACT
            else f"how={how!r} gives a matrix of any rank; say by rank= or energy= what to keep of it"
        )
    if (density is None) != (how not in SPARSE) or (density is not None and not 0.0 < density <= 1.0):
        need = "needs a density in (0, 1]" if how in SPARSE else "takes no density"
        raise ValueError(f"how={how!r} {need}, got {density!r}")
    if (key is None) != (not how.startswith("dare")):
        raise ValueError(f"how={how!r} " + ("drops at random, and needs a key" if key is None else "takes no key"))


def _check_size(rank: Any, energy: Any) -> None:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"energy is the part of the squared singular values that is kept, in (0, 1]; got {energy!r}")


def _models(adapters: Sequence[Any]) -> list[Any]:
    """The adapted models; one that is given by its leaves is of the make of the first that is given whole."""
    whole = [adapter for adapter in adapters if isinstance(adapter, nnx.Module)]
    if not whole:
        raise ValueError("none of the adapters is a model, which would say what their leaves mean")
    graphdef, _, frozen = partition(whole[0])
    models = [a if isinstance(a, nnx.Module) else combine(graphdef, a, frozen) for a in adapters]
    bases = [_base(model) for model in models]
    for i, base in enumerate(bases[1:], 1):
        odd = sorted({*base} ^ {*bases[0]}) or [path for path in base if not _same(base[path], bases[0][path])]
        if odd:
            raise ValueError(f"adapters 0 and {i} stand on different bases: {odd[0]} differs")
    return models


def _base(model: Any) -> Leaves:
    return {path: leaf for path, leaf in partition(model)[2].items() if ADAPTERS not in path.split("/")}


def _keys(groups: Any) -> list[Any]:
    """Keys of all mappings, in order, once."""
    return list(dict.fromkeys(key for group in groups for key in group))


def _weighted(changes: Sequence[Change], weights: Sequence[float], at: tuple[str, int]) -> list[Product]:
    found = [(c.kernels[at], w) for c, w in zip(changes, weights, strict=True) if at in c.kernels]
    return [Product(w * product.left, product.right) for product, w in found]


def _sum(changes: Sequence[Change], weights: Sequence[float], path: str) -> np.ndarray:
    found = [w * c.leaves[path] for c, w in zip(changes, weights, strict=True) if path in c.leaves]
    return np.sum(found, axis=0)


def _sparse(
    changes: Sequence[Change], weights: Sequence[float], how: str, density: float, key: Any, over: str
) -> tuple[Kernels, Mapping[str, np.ndarray]]:
    """TIES, DARE and pruning, on the matrices and the other leaves alike."""
    kernels, leaves = (_keys(groups) for groups in zip(*((c.kernels, c.leaves) for c in changes), strict=True))
    vectors = [_vector(c, changes, kernels, leaves) for c in changes]
    join: Callable[..., Vector] = elect if how in ("ties", "dare_ties") else total
    if how.startswith("dare"):
        names = [f"{path}/{layer}" for path, layer in kernels] + leaves
        own = [[jax.random.fold_in(fold_path(key, name), i) for name in names] for i in range(len(vectors))]
        thin = [drop(vector, density, keys) for vector, keys in zip(vectors, own, strict=True)]
    elif over == "model":
        thin = [trim(vector, density) for vector in vectors]
    else:
        thin = [[trim([array], density)[0] for array in vector] for vector in vectors]
    joined = join(thin, weights)
    return (
        {at: factored(matrix) for at, matrix in zip(kernels, joined, strict=False)},
        dict(zip(leaves, joined[len(kernels) :], strict=True)),
    )


def _vector(own: Change, changes: Sequence[Change], kernels: list[Any], leaves: list[str]) -> Vector:
    """All that one adapter changes, with zeros where only others change something."""

    def like(group: str, at: Any) -> Any:
        return next(getattr(c, group)[at] for c in changes if at in getattr(c, group))

    matrices = [own.kernels[at].dense() if at in own.kernels else 0.0 * like("kernels", at).dense() for at in kernels]
    return matrices + [own.leaves[at] if at in own.leaves else 0.0 * like("leaves", at) for at in leaves]


def _with_lora(base: nnx.Module, name: str, kernels: Kernels, leaves: Mapping[str, np.ndarray]) -> Any:
    """`base` with one LoRA that changes its projections by `kernels`, and with copies of what else changes."""
    found = {f.path: f for f in modules(base)}
    model = adapt(base, _method(found, kernels, leaves), key=jax.random.key(0), name=name)
    graphdef, trainable, frozen = partition(model)
    mark, new = f"{ADAPTERS}/{name}", {path: np.zeros(leaf.shape) for path, leaf in trainable.items()}
    for (path, layer), (left, right) in kernels.items():
        for leaf, factor in (("A", left), ("B", right)):
            into = new[f"{path}/{mark}/{leaf}"]
            into.reshape(-1, *into.shape[-2:])[layer, : factor.shape[0], : factor.shape[1]] = factor
    for path, leaf in trainable.items():
        if f"/{mark}/saved/" in f"/{path}":
            own = path.replace(f"{mark}/saved/", "")
            new[path] = np.asarray(leaf, np.float64) + leaves.get(own, 0.0)
    return combine(graphdef, {p: jnp.asarray(new[p], leaf.dtype) for p, leaf in trainable.items()}, frozen)


def _method(found: Mapping[str, Found], kernels: Kernels, leaves: Mapping[str, np.ndarray]) -> Any:
    """The LoRA of these ranks at these places, which trains copies of these leaves."""
    ranks = {}
    for (path, layer), product in kernels.items():
        for _, names in found[path].places:
            ranks[names[layer]] = max(1, product.left.shape[1])
    if not ranks:
        raise ValueError("none of the adapters changes a projection, so no LoRA can do what they do")
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    odd = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank}
    bias, whole = _copies(found, {path for path, _ in kernels}, leaves)
    lora: Any = METHODS["lora"]
    targets = "|".join(map(re.escape, ranks))
    return lora(
        rank=rank, alpha=rank, targets=targets, bias=bias, rank_pattern=odd, alpha_pattern=odd, modules_to_save=whole
    )


def _copies(found: Mapping[str, Found], acting: set[str], leaves: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """`bias=` and `modules_to_save=` under which copies of all these leaves are trained."""
    changed: dict[str, set[str]] = {}
    for path in leaves:
        module, _, leaf = path.rpartition("/")
        changed.setdefault(module, set()).add(leaf)
    outside = {path: names for path, names in changed.items() if path not in acting}
    whole = [path for path, names in outside.items() if names != {"bias"} or {*own_leaves(found[path].module)} == names]
    only_biases = outside.keys() - {*whole}
    return "all" if only_biases else "lora_only" if changed.keys() & acting else "none", tuple(whole)
