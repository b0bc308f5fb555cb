# SPDX-License-Identifier: Apache-2.0
"""A list of allowed system calls as a program for the kernel's filter (seccomp-BPF), and putting it in force."""

import ctypes
import errno
import os
from typing import NamedTuple

from . import _syscalls
from ._linux import prctl

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


class Instruction(NamedTuple):
    """One of BPF: what, how far to jump where it holds and where not, and its constant."""

    code: int
    holds: int
    fails: int
    constant: int


def program(machine: str, pid: int) -> list[Instruction]:
    """The filter of a process: a call of another architecture kills, one that is not allowed fails with EPERM.

    A number of x32 has a bit that no number of the list has, so it is not allowed either.
    """
    steps = [
        Instruction(_LOAD, 0, 0, _ARCH),
        Instruction(_EQUAL, 1, 0, _syscalls.ARCHITECTURES[machine]),
        Instruction(_RETURN, 0, 0, _KILL),
        Instruction(_LOAD, 0, 0, _NUMBER),
    ]
    for number in sorted(_syscalls.allowed(machine)):
        steps += _when(number, [_answer(_ALLOW)])
    for number in sorted(_syscalls.absent()):
        steps += _when(number, [_answer(_ERRNO | errno.ENOSYS)])
    for number, rule in sorted(_syscalls.checked(machine, pid).items()):
        steps += _when(number, _under(rule))
    return [*steps, _answer(_ERRNO | errno.EPERM)]


def install() -> None:
    """Puts this process, and all that it may become, under the filter, for good.

    Raises:
      OSError: the kernel takes none, or the machine is neither x86-64 nor aarch64.
    """
    machine = os.uname().machine
    if machine not in _syscalls.ARCHITECTURES or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    steps = program(machine, os.getpid())
    code = (_Filter * len(steps))(*steps)
    whole = _Program(len(steps), code)
    prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(whole))


def _when(number: int, then: list[Instruction]) -> list[Instruction]:
    return [Instruction(_EQUAL, 0, len(then), number), *then]


def _under(rule: _syscalls.Only | _syscalls.Without) -> list[Instruction]:
    """Allows where the low half of an argument, which is all that the kernel reads of an int, is as the rule says."""
    load = Instruction(_LOAD, 0, 0, _ARGUMENTS + 8 * rule.index)
    if isinstance(rule, _syscalls.Without):
        tests = [Instruction(_ANY_BIT, 0, 1, rule.mask), _answer(_ERRNO | errno.EPERM), _answer(_ALLOW)]
    else:
        tests = [step for value in rule.values for step in _when(value, [_answer(_ALLOW)])]
        tests += [_answer(_ERRNO | errno.EPERM)]
    return [load, *tests]


def _answer(value: int) -> Instruction:
    return Instruction(_RETURN, 0, 0, value)


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter)))
