# SPDX-License-Identifier: Apache-2.0
"""Numbers on their way from a file into an array that lies another way: nothing but their places changes."""

import ml_dtypes
import numpy as np
import pytest

from jpeft.models import _safetensors as safetensors

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(), (7,), (1, 5), (70, 33), (33, 130), (5, 40, 3), (0, 4)], ids=str)
def test_a_copy_is_numpys_whichever_side_is_turned(shape, dtype):
    values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    for turn_values in (False, True):
        for turn_out in (False, True):
            source = np.asfortranarray(values) if turn_values else values
            out = np.zeros(shape, dtype, order="F" if turn_out else "C")
            safetensors.copy(out, source)
            np.testing.assert_array_equal(out.astype(np.float64), values.astype(np.float64))


def test_a_bfloat16_is_the_upper_half_of_its_float32():
    """Each of the 65,536, against ml_dtypes' own conversion."""
    numbers = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):
        expected = numbers.astype(np.float32)
    np.testing.assert_array_equal(safetensors._widened(numbers), expected)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
def test_parts_make_the_whole_in_any_order(dtype, order, tmp_path, monkeypatch):
    """A tensor of many parts of several blocks, with fewer rows in the last of both."""
    monkeypatch.setattr(safetensors, "_BLOCK_BYTES", 3 * 20 * np.dtype(dtype).itemsize)
    monkeypatch.setattr(safetensors, "_BLOCKS", 2)
    values = np.random.default_rng(1).standard_normal((50, 20)).astype(dtype)
    source = safetensors.Source(values.shape, values.dtype, lambda: values)
    safetensors.write(tmp_path / "x.safetensors", {"x": source}, {})
    tensor = safetensors.header(tmp_path / "x.safetensors")["x"]
    out = np.zeros(values.shape, np.float32, order=order)
    parts = [*safetensors.reading(tensor, [((slice(None), slice(None)), out)])]
    assert len(parts) == 9
    for part in reversed(parts):
        part()
    np.testing.assert_array_equal(out, values.astype(np.float32))
