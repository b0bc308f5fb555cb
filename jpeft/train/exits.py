# SPDX-License-Identifier: Apache-2.0
"""What the program ends with: one exit code for each kind of end, and what is said of it."""

import sys
import traceback

#: A loss was not finite; what was given is wrong, or the disk is full; another process of the run is lost (BSD's
#: "unavailable"); interrupted, and can be resumed (BSD's "temporary failure; try again").
STOPPED, WRONG, LOST, INTERRUPTED = 1, 2, 69, 75


class Lost(RuntimeError):
    """Another process of this run did not come, is gone, or stands still."""


def report(error: BaseException, *, traced: bool = False) -> int:
    """Says on stderr what ended the program, in a line where the user can mend it, and gives the exit code.

    Args:
      error: what was raised.
      traced: whether the stack is shown first.
    """
    if traced:
        traceback.print_exception(error)
    if isinstance(error, Lost):
        print(f"jpeft: lost: {error}", file=sys.stderr, flush=True)
        return LOST
    if isinstance(error, FloatingPointError):
        print(f"jpeft: stopped: {error}", file=sys.stderr, flush=True)
        return STOPPED
    if explained(error):
        print(f"jpeft: error: {line(error)}", file=sys.stderr, flush=True)
        return WRONG
    if not traced:
        traceback.print_exception(error)
    return STOPPED


def explained(error: BaseException) -> bool:
    """Whether an error's own message says what to do, without its stack."""
    return isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, Lost)) or _no_room(error)


def _no_room(error: BaseException) -> bool:
    """Whether memory was too small: the host's, or as XLA says it a device's."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def line(error: BaseException) -> str:
    """An error's message, with what is missing where an import failed."""
    if _no_room(error):
        said = " ".join(str(error).split())[:300].rstrip(".")
        return (
            f"there is not enough memory{said and f': {said}'}. Smaller batches and shorter rows take less, and in "
            "training model.remat=full; `jpeft train ... --dry-run` says how much a training takes"
        )
    if isinstance(error, ImportError):
        return f"{error}; install the program's own requirements: pip install 'jpeft[train]'"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return str(error)
