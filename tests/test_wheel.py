# SPDX-License-Identifier: Apache-2.0
"""The built wheel: what is in it, and that it works in an empty environment, first bare, then with its extras."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"

#: The library alone, as the README shows it; ends by naming whatever it imported that no core dependency brings.
BARE = """
import sys, jax, jax.numpy as jnp, jpeft
from pathlib import Path
assert "site-packages" in jpeft.__file__, jpeft.__file__
key = jax.random.key(0)
sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
model = jpeft.models.build(dict(model_type="llama", **sizes), "CAUSAL_LM", key=key)
model = jpeft.adapt(model, jpeft.LoRA(rank=2, alpha=4, targets=["q_proj", "v_proj"]), key=key)
graphdef, trainable, frozen = jpeft.partition(model)
tokens = jnp.arange(8)[None]
loss = lambda t: jpeft.combine(graphdef, t, frozen)(tokens).var()
grads = jax.jit(jax.grad(loss))(trainable)
assert grads.keys() == trainable.keys()
jpeft.export_peft(model, "adapter")
jpeft.models.save(jpeft.merge(model), "merged")
assert Path("adapter/adapter_model.safetensors").is_file() and Path("merged/model.safetensors").is_file()
foreign = {"torch", "peft", "transformers", "datasets", "tyro", "pydantic", "sklearn"} & set(sys.modules)
assert not foreign, foreign
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


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment(wheel, tmp_path):
    """Bare: the README's story without torch. With its extras: the fast tests, against the installed package."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS)

    run(*pip, wheel, cwd=tmp_path)
    run(python, "-c", BARE, cwd=tmp_path, JAX_PLATFORMS="cpu")
    assert "train" in run(python.parent / "jpeft", "--help", cwd=tmp_path)

    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    run(*pip, torch, cwd=tmp_path)
    run(*pip, f"{wheel}[train,demo,test]", cwd=tmp_path)
    assert "predict" in run(python.parent / "jpeft", "--help", cwd=tmp_path)

    tree = tmp_path / "tree"
    leave = shutil.ignore_patterns(".*", "__pycache__", "jpeft", "*.egg-info", "build", "dist", "runs", "demo_out")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=leave)
    data = os.environ.get("JPEFT_DATA", str(ROOT.parent / "shared" / "data"))
    workers = os.environ.get("WORKERS", "2")
    log = run(python, "-m", "pytest", "-q", "-n", workers, "-m", "not slow", cwd=tree, JPEFT_DATA=data)
    assert " passed" in log.splitlines()[-1], log[-2000:]
