# SPDX-License-Identifier: Apache-2.0
"""Adapters and models in the formats of others: PEFT's adapter folders, merged Hugging Face folders, and the hub."""

from .card import Card as Card
from .hub import push as push
from .merged import export_merged as export_merged
from .peft import export_peft as export_peft
from .peft import import_peft as import_peft
