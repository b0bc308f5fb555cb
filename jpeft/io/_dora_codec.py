# SPDX-License-Identifier: Apache-2.0
"""DoRA in PEFT's files: LoRA's with `use_dora`, and one more tensor a module, lora_magnitude_vector `[d_out]`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .. import seams
from .._method import Adapter, Start
from ..methods import METHODS
from ._lora_codec import LORA, on_the_base
from ._names import Names
from ._slots import Codec, Slot, per_layer


def _portable(adapter: Any) -> Adapter:
    plain: Any = on_the_base(adapter)
    if plain is adapter:
        return adapter
    start = Start({"A": plain.A[...], "B": plain.B[...], "m": adapter.m[...]}, {"square": adapter.square[...]})
    saved = {name: leaf[...] for name, leaf in adapter.saved.items()}
    return Adapter(plain.method, adapter.site, start, saved, adapter.saved_layers)


def _slots(adapter: Any, module: Any, names: Names) -> list[Slot]:
    site = adapter.site
    for name, acts in zip(site.names, site.active, strict=True):
        if acts and names.tied.get(name):
            raise ValueError(
                f"{name} is {', '.join(names.tied[name])} as well, of which PEFT's DoRA would take other lengths, "
                "along the other axis; leave it out of targets, or merge and save the whole model"
            )
    if isinstance(seams.projection(module), seams.Convolution):
        raise ValueError(f"{site.path} is a convolution; jpeft writes PEFT's DoRA of matrices and embeddings alone")
    lengths = per_layer(site, lambda i: [Slot("lora_magnitude_vector", adapter.m)])
    return LORA.slots(adapter, module, names) + lengths


def _write(method: Any, adapters: Sequence[Adapter], names: Names) -> dict[str, Any]:
    return {**LORA.write(method, adapters, names), "use_dora": True}


def _read(config: dict[str, Any], names: Names) -> Any:
    lora: Any = LORA.read({**config, "use_dora": False}, names)
    dora: Any = METHODS["dora"]
    return dora(**{field.name: getattr(lora, field.name) for field in dataclasses.fields(dora)})


DORA = Codec("dora", "LORA", _portable, _slots, _write, _read, flag="use_dora")
