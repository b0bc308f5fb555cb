# SPDX-License-Identifier: Apache-2.0
"""The layers, put around the process that calls, from the inside and for good.

The order matters: what needs a privilege comes before privileges go, and the filter of system calls comes last, for it
refuses the calls that set up the rest.
"""

import ctypes
import os
import resource
import signal
from collections.abc import Callable

from . import _landlock, _seccomp
from ._linux import prctl, syscall, unshare

#: Without these no code is run. `landlock` may be stood in for by a file system that `bwrap` or `nsjail` made.
NEEDED = ("limits", "no new privileges", "landlock", "system calls")

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_NET = 0x04000000, 0x08000000, 0x10000000, 0x40000000
_CAPSET = {"x86_64": 126, "aarch64": 91}
_NOBODY = 65534
_LIBRARY = os.path.dirname(os.__file__)

Layers = dict[str, str]


class Unconfined(OSError):
    """A layer that is needed cannot be had, so no code is run; the message says which and why."""


def confine(seconds: float, memory: int, jailed: bool = False) -> Layers:
    """Puts every layer in force that the machine has; returns what each came to, by name.

    Args:
      seconds: of processor time.
      memory: bytes of address space.
      jailed: whether `bwrap` or `nsjail` made this process's view of files.

    Raises:
      Unconfined: one of `NEEDED` is missing.
    """
    layers: Layers = {}
    layers["namespaces"] = "the jail's" if jailed else _tried(_leave_namespaces)
    layers["identity"] = _tried(_drop_identity)
    layers["dies with its starter"] = _tried(lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))
    layers["limits"] = _tried(lambda: _limit(seconds, memory))
    layers["no new privileges"] = _tried(lambda: prctl(_PR_SET_NO_NEW_PRIVS, 1))
    layers["landlock"] = _tried(lambda: f"version {_landlock.restrict(readable())}")
    layers["system calls"] = _tried(_seccomp.install)
    needed = [name for name in NEEDED if not (jailed and name == "landlock")]
    missing = [f"{name} ({layers[name]})" for name in needed if layers[name].startswith("missing")]
    if missing:
        raise Unconfined(f"code of a model is not run here, for a layer around it is missing: {'; '.join(missing)}")
    return layers


def readable() -> list[str]:
    """What untrusted code may read: Python's library, the C libraries, time zones, and sources of zeros and noise."""
    return [
        _LIBRARY,
        os.path.dirname(_LIBRARY),
        *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"),
        *("/dev/null", "/dev/zero", "/dev/urandom"),
    ]


def _tried(layer: Callable[[], object]) -> str:
    """What a layer came to: what it says, `active`, or `missing` with the reason."""
    try:
        found = layer()
    except (OSError, ValueError) as error:  # `resource` raises the latter where the kernel says no
        return f"missing: {getattr(error, 'strerror', None) or error}"
    return found if isinstance(found, str) else "active"


def _leave_namespaces() -> str:
    """No network, no shared memory or host name of others: as root at once, else inside a user namespace."""
    apart = _NEW_NET | _NEW_IPC | _NEW_UTS
    user, group = os.getuid(), os.getgid()
    try:
        unshare(apart)
    except PermissionError:
        unshare(apart | _NEW_USER)
        prctl(_PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        return "user, network, ipc, uts"
    return "network, ipc, uts"


def _drop_identity() -> str:
    """Becomes nobody where root may and Python's library stays in reach; in any case drops every capability."""
    if os.geteuid() == 0 and _open_to_all(_LIBRARY):
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    syscall(_CAPSET[os.uname().machine], ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    return f"user {os.getuid()}, no capabilities"


def _open_to_all(path: str) -> bool:
    """Whether any user may go down to a folder and read it."""
    if os.stat(path).st_mode & 0o005 != 0o005:
        return False
    while path != (above := os.path.dirname(path)):
        path = above
        if not os.stat(path).st_mode & 0o001:
            return False
    return True


def _limit(seconds: float, memory: int) -> None:
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, most in limits.items():
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
