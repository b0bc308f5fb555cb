# SPDX-License-Identifier: Apache-2.0
"""The built wheel: what is in it, and that it works in an empty environment, first bare, then with its extras."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"

#: The README's example, with the library alone; ends by naming whatever it imported that no core dependency brings.
BARE = """
import sys, numpy, jpeft
assert "site-packages" in jpeft.__file__, jpeft.__file__
{example}
assert value < 6.2, value  # log(512) = 6.24 is what knowing nothing gives
jpeft.models.save(jpeft.strip(tuned), "my-base")
numpy.savez("logits.npz", tokens=tokens, tuned=tuned(tokens), base=jpeft.strip(tuned)(tokens))
foreign = {{"torch", "peft", "transformers", "datasets", "tyro", "pydantic", "sklearn"}} & set(sys.modules)
assert not foreign, foreign
"""
#: What it wrote, in the libraries that it was written for.
THEIRS = """
import numpy, peft, torch, transformers
found = numpy.load("logits.npz")
def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(found["tokens"]).long()).logits.numpy()
base, merged = (transformers.AutoModelForCausalLM.from_pretrained(name) for name in ("my-base", "my-model"))
size = abs(found["tuned"]).max()
assert abs(logits(base) - found["base"]).max() < 1e-5 * size
assert abs(logits(merged) - found["tuned"]).max() < 1e-5 * size
assert abs(logits(peft.PeftModel.from_pretrained(base, "my-adapter")) - found["tuned"]).max() < 1e-5 * size
assert abs(found["tuned"] - found["base"]).max() > 1e-2 * size
"""


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module", name="wheel")
def _wheel(tmp_path_factory):
    """The wheel, built from a copy of the tree so that nothing is left in it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "models", "train"):
        shutil.copy(ROOT / name, tree / name, follow_symlinks=False)
    shutil.copytree(ROOT / "jpeft", tree / "jpeft", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tree / "dist", tree, cwd=tree)
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"{wheel.name.split('-py3')[0]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"jpeft", info}
    tree = [file for file in (ROOT / "jpeft").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {name for name in names if name.startswith("jpeft/")} == {str(file.relative_to(ROOT)) for file in tree}
    metadata = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"{info}/licenses/LICENSE" in names
    assert "jpeft = jpeft.train.program:run" in zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()


@pytest.fixture(scope="module", name="python")
def _python(wheel, tmp_path_factory):
    """The interpreter of an empty environment into which the wheel was installed, with nothing beside it."""
    folder = tmp_path_factory.mktemp("empty") / "env"
    venv.create(folder, with_pip=True)
    install(folder / "bin" / "python", wheel)
    return folder / "bin" / "python"


def install(python, *what):
    run(python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, *what, cwd=python.parent)


def run_the_example(python, folder):
    """The README's example in `folder`."""
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    run(python, "-c", BARE.format(example=example), cwd=folder, JAX_PLATFORMS="cpu")


@pytest.mark.slow
def test_the_readme_in_an_empty_environment(python, tmp_path):
    """Its example, without torch."""
    run_the_example(python, tmp_path)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    assert "train" in run(python.parent / "jpeft", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_the_wheel_with_its_extras(python, wheel, tmp_path):
    """What the README's example wrote, in peft and transformers; then the fast tests, against the installed package."""
    run_the_example(python, tmp_path)
    install(python, next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")))
    install(python, f"{wheel}[train,demo,test]")
    run(python, "-c", THEIRS, cwd=tmp_path)
    assert "predict" in run(python.parent / "jpeft", "--help", cwd=tmp_path)

    tree = tmp_path / "tree"
    leave = shutil.ignore_patterns(".*", "__pycache__", "jpeft", "*.egg-info", "build", "dist", "runs", "demo_out")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=leave)
    data = os.environ.get("JPEFT_DATA", str(ROOT.parent / "shared" / "data"))
    workers = os.environ.get("WORKERS", "2")
    log = run(python, "-m", "pytest", "-q", "-n", workers, "-m", "not slow", cwd=tree, JPEFT_DATA=data)
    assert " passed" in log.splitlines()[-1], log[-2000:]
