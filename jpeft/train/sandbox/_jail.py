# SPDX-License-Identifier: Apache-2.0
"""`bwrap` or `nsjail` around a confined process: a view of files of its own.

What they protect is decided by their arguments alone, so these are few. The layers inside stand without them.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def installed() -> list[str]:
    """Paths of the tools that are here, the better first."""
    return [path for name in ("bwrap", "nsjail") if (path := shutil.which(name))]


def front(tool: str, readable: Sequence[str], folder: str, descriptors: Sequence[int]) -> list[str]:
    """What stands in front of a command so that it sees these paths, to read, and `folder` as its working directory.

    Args:
      tool: `bwrap` or `nsjail`, by path.
      readable: files and folders; one that is not there is left out.
      folder: an empty one.
      descriptors: files that stay open.
    """
    paths = sorted({path for path in (*readable, folder) if Path(path).exists()} - set(_DEVICES))
    if Path(tool).name == "bwrap":
        binds = [part for path in paths for part in ("--ro-bind", path, path)]
        return [tool, "--unshare-all", "--die-with-parent", *binds, "--dev", "/dev", "--chdir", folder, "--"]
    binds = [part for path in (*paths, *_DEVICES) for part in ("--bindmount_ro", path)]
    kept = [part for descriptor in descriptors for part in ("--pass_fd", str(descriptor))]
    limits = ["--time_limit", "0", "--disable_rlimits", "--disable_proc", "--iface_no_lo"]
    return [tool, "--mode", "o", "--quiet", *limits, *binds, *kept, "--cwd", folder, "--"]
