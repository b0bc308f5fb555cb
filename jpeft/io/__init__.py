# SPDX-License-Identifier: Apache-2.0
"""Adapters and models in the formats of others: PEFT's adapter folders, and merged Hugging Face folders."""

from ._drift import Drift as Drift
from ._drift import Sample as Sample
from ._drift import measure_drift as measure_drift
from .card import Card as Card
from .merged import export_merged as export_merged
from .peft import export_peft as export_peft
from .peft import import_peft as import_peft
