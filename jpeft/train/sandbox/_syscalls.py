# SPDX-License-Identifier: Apache-2.0
"""What untrusted code may ask of Linux, as numbers of x86-64 and of aarch64. Everything else is refused.

Python needs these to compute, to import from its library and to answer over a pipe that is open already. Not among
them: starting a process or a thread, sockets, signals to others, writing, making or removing a file, mounts, ptrace,
io_uring, bpf, keyrings, namespaces, other processes' memory.
"""

from typing import NamedTuple

#: `AUDIT_ARCH_*`, by what `uname -m` says.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


class Only(NamedTuple):
    """Argument `index` is one of `values`."""

    index: int
    values: tuple[int, ...]


class Without(NamedTuple):
    """Argument `index` has no bit of `mask`."""

    index: int
    mask: int


_ALLOWED: dict[str, dict[str, int]] = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
        "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
        "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25,
        "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38,
        "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrlimit": 97,
        "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
        "getppid": 110, "rt_sigpending": 127, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202,
        "getdents64": 217, "restart_syscall": 219, "clock_gettime": 228,
        "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262, "readlinkat": 267,
        "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "dup3": 292, "getrandom": 318,
        "statx": 332, "rseq": 334,
    },
    "aarch64": {
        "getcwd": 17, "dup": 23, "dup3": 24, "faccessat": 48, "close": 57, "getdents64": 61, "lseek": 62, "read": 63,
        "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73, "readlinkat": 78,
        "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "set_robust_list": 99,
        "nanosleep": 101, "getitimer": 102, "setitimer": 103, "clock_gettime": 113, "clock_getres": 114,
        "clock_nanosleep": 115, "sched_yield": 124, "restart_syscall": 128,
        "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigpending": 136, "rt_sigreturn": 139,
        "times": 153, "uname": 160, "getrlimit": 163, "getrusage": 165, "gettimeofday": 169, "getpid": 172,
        "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179,
        "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
        "statx": 291, "rseq": 293,
    },
}  # fmt: skip

_CHECKED = {
    "x86_64": {"ioctl": 16, "fcntl": 72, "tgkill": 234, "openat": 257, "prlimit64": 302, "sched_getaffinity": 204},
    "aarch64": {"ioctl": 29, "fcntl": 25, "tgkill": 131, "openat": 56, "prlimit64": 261, "sched_getaffinity": 123},
}

#: Newer forms of calls, whose arguments lie in memory or which the C library does without: "there is none" makes it
#: take the older form.
_ABSENT = {"clone3": 435, "openat2": 437, "faccessat2": 439}

# Same on both: O_WRONLY | O_RDWR, O_CREAT, O_TRUNC; TCGETS, TIOCGWINSZ, FIOCLEX; F_DUPFD, F_GETFD, F_SETFD, F_GETFL,
# F_DUPFD_CLOEXEC. Not F_SETOWN, by which the kernel sends signals in the caller's name.
_WRITES = 0o3 | 0o100 | 0o1000
_IOCTLS = (0x5401, 0x5413, 0x5451)
_FCNTLS = (0, 1, 2, 3, 1030)


def allowed(machine: str) -> frozenset[int]:
    """Calls that are allowed whatever their arguments."""
    return frozenset(_ALLOWED[machine].values())


def checked(machine: str, pid: int) -> dict[int, Only | Without]:
    """Calls that the process `pid` may make with some arguments: open to read, limits and signals of its own."""
    number = _CHECKED[machine]
    return {
        number["openat"]: Without(2, _WRITES),
        number["ioctl"]: Only(1, _IOCTLS),
        number["fcntl"]: Only(1, _FCNTLS),
        number["prlimit64"]: Only(0, (0, pid)),
        number["sched_getaffinity"]: Only(0, (0, pid)),
        number["tgkill"]: Only(0, (pid,)),  # abort()
    }


def absent() -> frozenset[int]:
    """Calls that are answered by ENOSYS."""
    return frozenset(_ABSENT.values())


def names(machine: str) -> dict[str, int]:
    """All numbers of this file by name."""
    return {**_ALLOWED[machine], **_CHECKED[machine], **_ABSENT}
