# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint needs beside its codes while it is read and quantized."""

import jax
import jax.numpy as jnp
import pytest

from jpeft._schemes import SCHEMES
from jpeft.models import _quantizing


@pytest.mark.parametrize("scheme, most", [("nf4_double", 0.85), ("int8", 1.55), ("int4_32_asymmetric", 1.6)])
def test_quantizing_takes_the_room_of_one_layer(scheme, most):
    """By the compiled program: what it needs beside codes and the layers that were read, in layers of float32.

    One layer is there in its own dtype, half of that, and at most once in float32.
    """
    stack = jax.ShapeDtypeStruct((3, 512, 1024), jnp.bfloat16)
    shapes = jax.eval_shape(SCHEMES[scheme].quantize, stack)
    program = _quantizing._putting(scheme, None).lower(shapes, stack, 0, 0).compile()
    assert program.memory_analysis().temp_size_in_bytes <= most * 4 * 512 * 1024
