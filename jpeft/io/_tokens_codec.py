# SPDX-License-Identifier: Apache-2.0
"""Trainable tokens in PEFT's files: trainable_tokens_delta `[tokens, d_model]`, which for all its name holds the rows.

A table that stands in several places (T5's stacks, a tied head) has the same tensor under the name of each. PEFT saves
no head of a task beside it.
"""

import itertools
from collections.abc import Sequence
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
