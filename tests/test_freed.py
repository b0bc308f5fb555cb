# SPDX-License-Identifier: Apache-2.0
"""Freed memory that goes back to the system: what the process holds, asked of the kernel."""

import ctypes
import re
from pathlib import Path

from jpeft import _freed as freed


def resident_mb() -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) / 1024


def test_what_is_free_goes_back_to_the_system():
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes, library.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    blocks = [library.malloc(64 << 10) for _ in range(4000)]  # each below what is mapped on its own
    for block in blocks:
        ctypes.memset(block, 1, 64 << 10)
    top = library.malloc(64 << 10)  # stands above them all, so that freeing them moves no border
    for block in blocks:
        library.free(block)
    held = resident_mb()
    freed.give_back()
    library.free(top)
    assert resident_mb() < held - 200


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(freed, "_malloc_trim", lambda: None)
    assert freed.give_back() is None
