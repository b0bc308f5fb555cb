# SPDX-License-Identifier: Apache-2.0
"""What a caller may hand in where an array is only read: one of JAX, or one of NumPy, which JAX takes as its own."""

from typing import TypeAlias

import jax
import numpy as np

#: As in `Int[Given, "batch seq"]`.
Given: TypeAlias = jax.Array | np.ndarray
