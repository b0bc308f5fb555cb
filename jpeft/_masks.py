# SPDX-License-Identifier: Apache-2.0
"""Selecting leaves of a flat dict, and optimizers that treat them differently.

A selector is
  a path pattern   `"**/B"`; `*` is within one part of a path, `**` is any number of whole parts;
  a method         `jpeft.LoRA`, or an instance of it: the leaves of its adapters under their default name;
  a Variable type  `jpeft.AdapterParam`, `nnx.Param`, ...
"""

import re
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import optax
from flax import nnx

from ._graft import ADAPTERS
from ._method import AdapterParam, Method
from ._partition import GraphDef
from ._steering import steered
from ._targets import nearest

Selector = str | Method | type

#: The label of leaves that no rule names and that must not be updated.
FROZEN = "frozen"


def mask(tree: Any, *selectors: Selector) -> dict[str, bool]:
    """`{path: whether any selector selects it}` over a flat dict (or over the leaves of a model).

    Raises:
      ValueError: a selector selects nothing.

    Example:
      >>> no_decay = jpeft.mask(trainable, "**/saved/bias")
    """
    if not selectors:
        raise ValueError("mask needs at least one selector: a path pattern, a method or a Variable type")
    types = _types(tree)
    hits = [{path: _selects(selector, path, kind) for path, kind in types.items()} for selector in selectors]
    for selector, hit in zip(selectors, hits, strict=True):
        if not any(hit.values()):
            raise ValueError(f"selector {selector!r} selects no leaf; nearest: {nearest(str(selector), types)}")
    return {path: any(hit[path] for hit in hits) for path in types}


def labels(tree: Any, rules: Mapping[Any, str]) -> dict[str, str]:
    """`{path: label of the first rule whose selector selects it}`, for `optax.partition`.

    Raises:
      ValueError: a leaf that no rule names (end with `"**"` to catch the rest), or a rule that no leaf needs.

    Example:
      LoRA+ (Hayou et al. 2024), a 16 times higher rate for B:
      >>> rates = {"a": optax.adamw(1e-4), "b": optax.adamw(16e-4)}
      >>> tx = optax.partition(rates, jpeft.labels(trainable, {"**/B": "b", "**": "a"}))
    """
    found: dict[str, str] = {}
    for selector, label in rules.items():
        mine = [path for path, hit in mask(tree, selector).items() if hit and path not in found]
        if not mine:
            raise ValueError(f"the rule {selector!r} comes too late: all its leaves have a label of an earlier rule")
        found |= dict.fromkeys(mine, label)
    left = [path for path in _types(tree) if path not in found]
    if left:
        raise ValueError(
            f"{len(left)} leaves have no label, such as {left[0]}; end the rules with '**' to catch the rest"
        )
    return {path: found[path] for path in _types(tree)}


def optimizer(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    *selectors: Selector,
    rules: Mapping[Any, str] | None = None,
    model: nnx.Module | GraphDef | None = None,
) -> optax.GradientTransformation:
    """An optimizer of a trainable tree that is limited to, or differs between, some of its leaves.

    Of a model whose methods take part in updates (`AdaLoRA` allocates ranks) it needs the model. Gradients are
    accumulated outside of it: `optax.MultiSteps(jpeft.optimizer(tx, model=model), k)`.

    Args:
      tx: one transformation, or several by label.
      *selectors: with one transformation, the leaves that it updates; the others get no update at all. (What
        `optax.masked` leaves out passes through as raw gradient, so it is zeroed here.) None means all leaves.
      rules: with several, selector -> label, first match counts; see `labels`.
      model: the adapted model, or its graphdef.

    Example:
      >>> jpeft.optimizer(optax.adamw(1e-4), model=model)
      >>> jpeft.optimizer(optax.adamw(1e-4), "**/B")
      >>> jpeft.optimizer({"a": optax.adamw(1e-4), "b": optax.adamw(16e-4)}, rules={"**/B": "b", "**": "a"})
    """
    chosen = _chosen(tx, selectors, rules)
    return _checked(chosen if model is None else steered(chosen, model))


def _chosen(tx: Any, selectors: tuple[Selector, ...], rules: Mapping[Any, str] | None) -> Any:
    if isinstance(tx, Mapping):
        if not rules or selectors:
            raise TypeError("several transformations need rules=, selector -> label, and no further selectors")
        unknown = sorted(set(rules.values()) - set(tx))
        unused = sorted(set(tx) - set(rules.values()))
        if unknown or unused:
            raise ValueError(f"labels without a transformation: {unknown}; transformations without a rule: {unused}")
        return optax.partition({**tx}, lambda tree: labels(tree, rules))
    if rules is not None:
        raise TypeError("rules= gives labels to several transformations; pass tx as {label: transformation}")
    if not selectors:
        return tx
    parts: dict[Hashable, optax.GradientTransformation] = {"selected": tx, FROZEN: optax.set_to_zero()}

    def choose(tree: Any) -> dict[str, str]:
        return {path: "selected" if hit else FROZEN for path, hit in mask(tree, *selectors).items()}

    return optax.partition(parts, choose)


def _checked(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, refusing to optimize nothing."""

    def init(params: Any) -> Any:
        if not jax.tree.leaves(params):
            raise ValueError("there is nothing to train: the trainable tree is empty; adapt the model first")
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(tx).update)


def _types(tree: Any) -> dict[str, type | None]:
    """Path and Variable type of every leaf; in a flat dict of arrays only adapters' leaves have a known one."""
    if isinstance(tree, nnx.Module):
        _, flat = nnx.graph.flatten(tree)
        return {"/".join(map(str, path)): type(leaf) for path, leaf in zip(flat.paths, flat.leaves, strict=True)}
    if not isinstance(tree, Mapping) or not all(isinstance(path, str) for path in tree):
        raise TypeError(
            f"expected a model or a flat {{path: array}} dict as of jpeft.partition, got {type(tree).__name__}"
        )
    return {path: AdapterParam if ADAPTERS in path.split("/") else None for path in tree}


def _selects(selector: Selector, path: str, kind: type | None) -> bool:
    if isinstance(selector, str):
        return _pattern(selector).fullmatch(path) is not None
    method = selector if isinstance(selector, type) else type(selector)
    if issubclass(method, Method):
        return f"/{ADAPTERS}/{method.kind}/" in f"/{path}"
    if not issubclass(method, nnx.Variable):
        raise TypeError(f"a selector is a path pattern, a method or a Variable type; got {selector!r}")
    if kind is None:
        raise TypeError(
            f"the type of {path} is not known from a flat dict; pass the model to select by {method.__name__}"
        )
    return issubclass(kind, method)


def _pattern(pattern: str) -> re.Pattern[str]:
    """`**/` any parts, `**` anything, `*` within a part, `?` one character of it."""
    out = ""
    for token in re.split(r"(\*\*/|\*\*|\*|\?)", pattern):
        out += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
    return re.compile(out)
