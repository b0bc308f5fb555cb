# SPDX-License-Identifier: Apache-2.0
"""Adapters and models in the formats of others: PEFT's and AdapterHub's folders, merged models, and the hub."""

from ._drift import Drift as Drift
from ._drift import Sample as Sample
from ._drift import measure_drift as measure_drift
from .adapters import export_adapters as export_adapters
from .adapters import import_adapters as import_adapters
from .card import Card as Card
from .hub import push as push
from .merged import export_merged as export_merged
from .peft import export_peft as export_peft
from .peft import import_peft as import_peft
from .targets import Findings as Findings
from .targets import check as check
from .verify import Contents as Contents
from .verify import verify as verify
