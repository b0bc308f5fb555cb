# SPDX-License-Identifier: Apache-2.0
"""The sections of a configuration: one file each, a frozen dataclass that knows what of its own values cannot be."""

from .data import Data
from .logging import Logging
from .model import Model
from .optimizer import Optimizer
from .preference import Preference
from .training import Train

__all__ = ["Data", "Logging", "Model", "Optimizer", "Preference", "Train"]
