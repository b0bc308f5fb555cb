# SPDX-License-Identifier: Apache-2.0
"""Trainable tokens in PEFT's files: trainable_tokens_delta `[tokens, d_model]`, which for all its name holds the rows.

A table that stands in several places (T5's stacks, a tied head) has the same tensor under the name of each. PEFT saves
no head of a task beside it.

Beside a LoRA they are a part of its folder: trainable_token_indices in its configuration, and every table's rows once,
under `token_adapter`.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from .. import seams
from .._method import Adapter, Method
from ..methods import METHODS
from ._keys import check_keys
from ._names import Names
from ._selection import selected
from ._slots import Codec, Slot, layer_index

_KNOWN = ("exclude_modules", "init_weights", "target_modules", "token_indices")


def _slots(adapter: Any, module: Any, names: Names) -> list[Slot]:
    site = adapter.site
    return [
        Slot(f"{place}.trainable_tokens_delta", adapter.rows, layer_index(site.lead, i))
        for i, name in enumerate(site.names)
        if site.active[i]
        for place in (name, *names.shared.get(name, ()))
    ]


def _write(method: Any, adapters: Sequence[Adapter], names: Names) -> dict[str, Any]:
    sites = [adapter.site for adapter in adapters if adapter.acts]
    return {
        "init_weights": True,
        # an expression, as PEFT writes itself: of a list it warns that nothing ties a head, though it does
        "target_modules": "|".join(sorted(n for site in sites for n in itertools.compress(site.names, site.active))),
        "token_indices": [*method.token_indices],
    }


def _read(config: dict[str, Any], names: Names) -> Method:
    check_keys(config, "TrainableTokens", _KNOWN)
    tables = {name for name in _tables(names) if selected(config, name)}
    if not tables:
        raise ValueError(f"target_modules={config.get('target_modules')!r} is no embedding of this model")
    method: Any = METHODS["trainable_tokens"]
    return method(config.get("token_indices") or (), targets=sorted(tables), modules_to_save=())


def _tables(names: Names) -> frozenset[str]:
    """Names of the embeddings."""
    return frozenset(
        name
        for name in names.projections & names.paths.keys()
        if isinstance(seams.projection(names.found[names.paths[name]].module), seams.Lookup)
    )


TRAINABLE_TOKENS = Codec(
    "trainable_tokens", "TRAINABLE_TOKENS", lambda adapter: adapter, _slots, _write, _read, saves=False, on_copies=True
)


# Beside a LoRA ------------------------------------------------------------------------------------------------------

#: The key of a LoRA's configuration.
BESIDE = "trainable_token_indices"


def _beside_slots(adapter: Any, module: Any, names: Names) -> list[Slot]:
    (name,) = adapter.site.names
    return [Slot(f"{name}.token_adapter.trainable_tokens_delta", adapter.rows)]


#: Rows as a part of another method's folder.
TOKENS_BESIDE = dataclasses.replace(TRAINABLE_TOKENS, slots=_beside_slots)


def apart(adapters: Mapping[str, Adapter]) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """The parts of an adapter by path: those of its method, and the trained tokens beside it.

    Raises:
      ValueError: modules are trained whole with the tokens, where PEFT has them with the method.
    """
    rows = {path: adapter for path, adapter in adapters.items() if adapter.method.kind == TRAINABLE_TOKENS.kind}
    if len(rows) == len(adapters):
        return rows, {}
    saved = sorted(path for path, adapter in rows.items() if adapter.saved_layers)
    if saved:
        raise ValueError(
            f"the trained tokens go into a LoRA's folder, and it is the LoRA that trains {', '.join(saved)} whole "
            "there; adapt with TrainableTokens(..., modules_to_save=())"
        )
    return {path: adapter for path, adapter in adapters.items() if path not in rows}, rows


def write_beside(rows: Mapping[str, Adapter]) -> dict[str, Any]:
    """The entry of a LoRA's configuration; nothing where no tokens are trained."""
    tables = {name: [*adapter.method.token_indices] for adapter in rows.values() for name in adapter.site.names}  # type: ignore[attr-defined]
    return {BESIDE: tables} if tables else {}


def read_beside(config: Mapping[str, Any], names: Names) -> Any:
    """`LoRA(trainable_token_indices=...)` of a configuration, in which a tied head may stand beside its table.

    Raises:
      ValueError: the model has no such table, or one half of a tied table trains other tokens than the other.
    """
    given = config.get(BESIDE) or None
    if not isinstance(given, Mapping):
        return given
    chosen = {
        name: ids for entry, ids in given.items() for name in {*names.paths} | names.repeats if _ends(name, entry)
    }
    unknown = [entry for entry in given if not any(_ends(name, entry) for name in chosen)]
    if unknown:
        raise ValueError(f"{BESIDE} names {unknown[0]!r}, which this model does not have")
    for table, heads in names.tied.items():
        for head in heads:
            ids = chosen.pop(head, chosen.get(table))
            if ids != chosen.get(table):
                raise ValueError(
                    f"{BESIDE} trains the tokens {ids} of {head} and {chosen.get(table)} of {table}, and in this model "
                    "they are one table (tie_word_embeddings), so that a change would be in both"
                )
    return chosen


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")
