# SPDX-License-Identifier: Apache-2.0
"""Landlock: from now on this process sees a few folders, to read, and none to write; it needs no privilege.

The kernel says which version it has; newer ones also keep a process from TCP ports (4), and from signals and abstract
sockets of processes outside (6).
"""

import ctypes
import errno
import os
from collections.abc import Sequence

from ._linux import syscall

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
#: Rights over files that each version knows, TCP ports, and scopes; a right that is handled and not given is denied.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_NET_RIGHTS, _SCOPES = 0b11, 0b11


def version() -> int:
    """Of the kernel's Landlock.

    Raises:
      OSError: it has none, or it is switched off.
    """
    return syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))


def restrict(readable: Sequence[str]) -> int:
    """Leaves these files and folders readable, with all in them, and nothing else; returns the version.

    Raises:
      OSError: the kernel has no Landlock.
    """
    found = version()
    attributes = [max(rights for known, rights in _FILE_RIGHTS.items() if known <= found)]
    attributes += [_NET_RIGHTS] * (found >= 4) + [_SCOPES] * (found >= 6)
    rules = (ctypes.c_uint64 * len(attributes))(*attributes)
    ruleset = syscall(_CREATE, ctypes.byref(rules), ctypes.c_size_t(ctypes.sizeof(rules)), ctypes.c_uint32(0))
    try:
        for path in readable:
            _allow(ruleset, path)
        syscall(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return found


def _allow(ruleset: int, path: str) -> None:
    """Leaves one path readable; one that is not there needs nothing."""
    try:
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return
        raise
    try:
        rights = _READ_FILE | (_READ_FOLDER if os.path.isdir(path) else 0)
        rule = _Beneath(rights, at)
        syscall(_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(at)


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))
