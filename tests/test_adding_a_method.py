# SPDX-License-Identifier: Apache-2.0
"""The page about adding a method, followed to the letter in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = """# Output scale

```
y = (x W + b) * l        l [d_out]
```

**Where it sits**

```
x ── W, b (frozen) ── * l ── y
```

`targets`, `exclude`, `layers`, `modules_to_save` are as of [LoRA](../lora.md).

**Start**: ones. **Counts**: `d_out` trained per target. **When**: never alone.

**Measured**: nothing yet of `OutputScale`.

<!-- measured | output scale -->

<!-- end -->

```python
model = jpeft.adapt(model, jpeft.OutputScale(targets=["q_proj", "v_proj"]), key=key)
```
"""


@pytest.fixture(name="copy")
def _copy(tmp_path):
    """The repository with the method of the page in it."""
    for name in ("jpeft", "tests", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.npz", "stored"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("models", "train"):
        (tmp_path / name).symlink_to(Path("jpeft") / name)
    method, line = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding_a_method.md").read_text(), re.DOTALL)
    (tmp_path / "jpeft/methods/output_scale.py").write_text(method)
    methods = tmp_path / "jpeft/methods/__init__.py"
    _insert(methods, "from .p_tuning", "from .output_scale import OutputScale as OutputScale\n")
    _insert(methods, "        BitFit,", "        OutputScale,\n")
    _insert(tmp_path / "jpeft/__init__.py", '    "PTuning",', '    "OutputScale",\n')
    _insert(tmp_path / "tests/contracts/lines.py", '    "direft": Line(', line)
    (tmp_path / "docs/methods/output_scale.md").write_text(PAGE)
    _run(tmp_path, "benchmarks/method_pages.py")
    return tmp_path


def _insert(file, before, line):
    """Puts `line` in front of the only line that begins with `before`."""
    text = file.read_text()
    assert text.count(f"\n{before}") == 1, (file, before)
    file.write_text(text.replace(f"\n{before}", f"\n{line}{before}"))


def _run(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(folder), "JPEFT_TEST_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_method_added_as_the_page_says_passes_what_every_method_must(copy):
    house = "method or output_scale or OutputScale or lines or imports or conventions"
    assert _passed(copy, "tests/test_architecture.py", "tests/contracts/test_table.py", "-k", house) > 10
    assert _passed(copy, "tests/test_method_pages.py", "tests/methods/test_fields.py", "-k", "output_scale") >= 4
    assert _passed(copy, "tests/contracts", "-m", "slow or not slow", "-k", "output and scale") > 100


def _passed(folder, *arguments):
    """How many tests pass; none may fail."""
    shown = _run(folder, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments)
    return int(re.findall(r"(\d+) passed", shown)[-1])
