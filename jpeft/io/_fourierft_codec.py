# SPDX-License-Identifier: Apache-2.0
"""FourierFT in PEFT's files: fourierft_spectrum `[n_frequency]`.

The places of the numbers are in no file: PEFT draws them from `random_loc_seed`, and jpeft the same. An adapter with
others, or on kernels so large that jpeft's places are not PEFT's, is refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _mersenne
from ._module_codec import module_codec
from ._slots import Slot, host, layer_index


def _tensors(adapter: Any, layer: int) -> list[Slot]:
    site, method = adapter.site, adapter.method
    size, name = site.d_in * site.d_out, site.names[layer]
    if size >= _mersenne.LONGEST:
        raise ValueError(
            f"{name} has {size:,} weights, and from {_mersenne.LONGEST:,} on PEFT draws the places of frequencies in a "
            "way that jpeft does not; merge and save the model"
        )
    places = host(adapter.places[...], f"{name}.places", np.int64)[layer_index(site.lead, layer)]
    if not np.array_equal(places, method.places(site)):
        raise ValueError(
            f"{name}: the adapter's places of frequencies are not those that PEFT would draw from "
            f"random_loc_seed={method.location_key}, and its files hold no others; merge and save the model"
        )
    return [Slot("fourierft_spectrum", adapter.c)]


def _write(method: Any) -> dict[str, Any]:
    return {"init_weights": method.init == "zero"}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"init": "zero" if config.get("init_weights") else "normal"}


FOURIERFT = module_codec(
    "fourierft",
    "FOURIERFT",
    _tensors,
    {"n_frequency": "n_frequency", "scaling": "scaling", "location_key": "random_loc_seed"},
    {"bias": "none", "n_frequency_pattern": {}},
    in_out=True,
    write=_write,
    read=_read,
    reads="init_weights",
)
