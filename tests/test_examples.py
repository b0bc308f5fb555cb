# SPDX-License-Identifier: Apache-2.0
"""Every script in examples/ and every complete program in the pages runs as it stands."""

import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jpeft

ROOT = pathlib.Path(__file__).parent.parent


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example(script, capsys):
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out


def test_readme_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code_blocks("README.md")[0], names)
    assert float(names["value"]) < 6.3  # log(512) = 6.24 is what knowing nothing gives
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def test_many_adapters_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec("\n".join(code_blocks("docs/many_adapters.md")), names)
    assert len(names["bank"]) == 4
    assert names["trained"].losses.shape == (5, 3)
    assert max(names["errors"].values()) <= 0.1


def test_generation_page():
    names: dict = {}
    exec("\n".join(code_blocks("docs/generation.md")), names)
    assert names["greedy"].shape == names["drawn"].shape == names["mixed"].shape == (2, 8)
    assert names["texts"].shape == (2, 2, 8)
    assert (names["ids"] == names["greedy"][:, 4:]).all()
    assert (names["token"][:, 0] == names["greedy"][:, 0]).all()
    alone = jpeft.models.generate(names["other"], names["prompts"], names["mask"], max_new_tokens=8)
    assert (names["mixed"][0] == alone[0]).all()


def test_quantization_page():
    names: dict = {}
    exec(code_blocks("docs/quantization.md")[0], names)
    assert names["summary"].base_bytes < 0.6 * jpeft.summary(names["base"]).base_bytes  # the embeddings stay
    ids = jnp.arange(6)[None]
    assert jnp.abs(names["merged"](ids) - names["better"](ids)).max() < 1e-5


@jax.numpy_rank_promotion("allow")  # the page's formula broadcasts, for brevity
def test_method_page_example():
    """The method on the page about adding one: starts as the base, merges to itself."""
    names: dict = {"__name__": "jpeft.methods.output_scale", "__package__": "jpeft.methods"}
    exec(code_blocks("docs/adding_a_method.md")[0], names)
    base = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    base.layers[0].bias[...] = jnp.arange(4.0)
    model = jpeft.adapt(base, names["OutputScale"](targets=("layers.0", "layers.2")), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    assert (model(x) == base(x)).all()
    graphdef, trainable, frozen = jpeft.partition(model)
    trainable = {path: leaf * 1.5 for path, leaf in trainable.items()}
    model = jpeft.combine(graphdef, trainable, frozen)
    assert float(jnp.abs(model(x) - base(x)).max()) > 0.1
    assert jnp.allclose(jpeft.merge(model)(x), model(x), rtol=1e-6, atol=1e-6)
    assert jpeft.summary(model).trainable == 6
