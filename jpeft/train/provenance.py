# SPDX-License-Identifier: Apache-2.0
"""Which sources a run was made with: the commit of the working directory, and of jpeft where it is a checkout."""

import subprocess
from pathlib import Path
from typing import Any


def git_states() -> dict[str, dict[str, Any] | None]:
    """`{"working_directory": ..., "jpeft": ...}`, each the commit and whether files differ from it, or None."""
    package = Path(__file__).parents[1]
    inside = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    return {"working_directory": git_state(Path.cwd()), "jpeft": git_state(package) if inside else None}


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a folder and whether tracked files differ from it; None outside of git, or before a commit."""
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where it refuses, is not there, or takes longer than a run should wait."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
