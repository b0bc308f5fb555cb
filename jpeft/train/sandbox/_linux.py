# SPDX-License-Identifier: Apache-2.0
"""System calls that Python's library has no function for; each raises OSError where the kernel says no."""

import ctypes
import os
from collections.abc import Callable
from typing import Any


def prctl(option: int, *arguments: int) -> int:
    """`prctl(2)`."""
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return _checked(_libc().prctl, ctypes.c_int(option), *values)


def syscall(number: int, *arguments: Any) -> int:
    """`syscall(2)`."""
    return _checked(_libc().syscall, ctypes.c_long(number), *arguments)


def unshare(flags: int) -> None:
    """`unshare(2)`."""
    _checked(_libc().unshare, ctypes.c_int(flags))


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _checked(function: Callable[..., int], *arguments: Any) -> int:
    found = function(*arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found
