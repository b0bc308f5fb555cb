# SPDX-License-Identifier: Apache-2.0
"""The console script `jpeft`: `cli.main` in a process that gets its memory in huge pages.

XLA on a CPU takes the memory of a step from the system and gives it back, in every step; in pages of 4 KiB that is a
tenth of the step's time. glibc asks for pages of 2 MiB where the environment says so when the process starts, so the
program starts itself once more with that setting. Where the C library is another one, or Linux grants no huge pages,
nothing changes.
"""

import os
import sys
from collections.abc import Mapping

from . import cli

#: The C library's settings, and the one for memory in huge pages.
VARIABLE, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def run() -> None:
    """Runs `jpeft` with the process's arguments."""
    environment = restart_environment(sys.platform, os.environ)
    if environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    cli.main()


def restart_environment(platform: str, environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment to start again in; None where it says something on these settings already, or off Linux."""
    if platform != "linux" or VARIABLE in environment:
        return None
    return {**environment, VARIABLE: HUGE_PAGES}


if __name__ == "__main__":
    run()
