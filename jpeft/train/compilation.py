# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept on disk between runs of `jpeft`, so that a second start does not compile again.

JAX keeps them and reads them back: an entry that is damaged is said and compiled anew. Here is only where they lie:
one folder a user, and in it one for each kind of processor, for homes are shared among machines and a program for a CPU
holds that CPU's instructions. The folder is kept to a size: what was not read for longest goes first.
"""

import contextlib
import hashlib
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

#: A folder for what is `auto`, in the place of the user's; `off` keeps nothing.
VARIABLE = "JPEFT_COMPILATION_CACHE"
#: Megabytes of programs that are kept.
MOST_MB = 2048
_CPU = Path("/proc/cpuinfo")


def keep_programs(setting: str | None = "auto", most_mb: int | None = MOST_MB) -> str:
    """Tells JAX where programs are kept; before the first is compiled.

    Args:
      setting: a folder; `auto` for the one that JAX was given already, else `$JPEFT_COMPILATION_CACHE`, else the
        user's; None for none.
      most_mb: megabytes (2^20 bytes) that are kept in it; None is no bound. What JAX was told itself
        (`JAX_COMPILATION_CACHE_MAX_SIZE`) stays.

    Returns:
      What was chosen, as a line for the user.

    Raises:
      OSError: a folder that was named cannot be made.
    """
    import jax

    given = jax.config.values["jax_compilation_cache_dir"]
    if setting == "auto" and (given is not None or not jax.config.values["jax_enable_compilation_cache"]):
        return f"compiled programs: as JAX was told, {given or 'not kept'}"
    folder = chosen(setting, os.environ, Path.home)
    if folder is None:
        jax.config.update("jax_enable_compilation_cache", False)
        return "compiled programs: not kept"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if setting != "auto":
            raise
        return f"compiled programs: not kept, for {folder} cannot be made ({error.strerror})"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if most_mb is not None and jax.config.values["jax_compilation_cache_max_size"] == -1:
        date(folder)
        jax.config.update("jax_compilation_cache_max_size", most_mb * 2**20)
    bound = jax.config.values["jax_compilation_cache_max_size"]
    return f"compiled programs: kept in {folder}" + ("" if bound == -1 else f", up to {bound / 2**20:,.0f} MB")


def date(folder: Path) -> None:
    """Gives every program of a folder a time of its last use where it has none: when it was written.

    Those that were kept without a bound have none, and JAX, which removes the oldest by that time, would keep nothing
    new beside them.
    """
    for program in folder.glob("*-cache"):
        used = program.with_name(program.name.removesuffix("-cache") + "-atime")
        with contextlib.suppress(OSError):  # another process may have removed it
            if not used.exists():
                used.write_bytes(program.stat().st_mtime_ns.to_bytes(8, "little"))


def chosen(setting: str | None, environment: Mapping[str, str], home: Callable[[], Path]) -> Path | None:
    """The folder for a setting of `keep_programs`; None keeps nothing. `home()` is asked only where it is needed."""
    named = environment.get(VARIABLE, "") if setting == "auto" else setting
    if named is None or named == "off":
        return None
    if named:
        return Path(named)
    stated = environment.get("XDG_CACHE_HOME", "")
    user = Path(stated) if Path(stated).is_absolute() else home() / ".cache"
    return user / "jpeft" / "programs" / processor()


def processor() -> str:
    """A name for this kind of processor: its architecture, and what instructions it has where Linux lists them."""
    lines = _CPU.read_text(errors="replace").splitlines() if _CPU.is_file() else []
    can = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(can.encode()).hexdigest()[:8]}"
