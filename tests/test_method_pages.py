# SPDX-License-Identifier: Apache-2.0
"""The page of every method: what it says of its options, what was measured, and that its example runs as it stands."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jpeft

ROOT = Path(__file__).parents[1]
KEY = jax.random.key(0)
#: The page of each kind, where it is not called so.
SHARED = {
    "lora": "../lora", "houlsby": "bottleneck", "pfeiffer": "bottleneck", "parallel_adapter": "bottleneck",
    "last_layers": "full", "loreft": "reft", "noreft": "reft", "direft": "reft",
}  # fmt: skip
PAGES = {kind: (ROOT / "docs/methods" / f"{SHARED.get(kind, kind)}.md").resolve() for kind in jpeft.METHODS}
FILES = sorted({*PAGES.values(), ROOT / "docs/methods/hybrids.md"})
#: Options that every page may leave to the page of LoRA, or of another method, as it says.
OTHERS = {
    "compacter": PAGES["pfeiffer"],
    "p_tuning": PAGES["prompt_tuning"],
    "dora": PAGES["lora"],
    "adalora": PAGES["lora"],
}
LLAMA = {
    "model_type": "llama", "vocab_size": 151_700, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
BERT = {
    "model_type": "bert", "vocab_size": 32, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 32, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32,
}  # fmt: skip
#: Pages whose example speaks of encoders.
ENCODERS = ("adapter_fusion", "bitfit", "compacter", "hybrids")


@pytest.fixture(name="pages", scope="module")
def _pages():
    spec = importlib.util.spec_from_file_location("method_pages", ROOT / "benchmarks" / "method_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_of_a_method():
    assert {*(ROOT / "docs" / "methods").glob("*.md")} | {ROOT / "docs/lora.md"} == {*FILES}


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.stem)
def test_a_page_has_all_its_parts(page):
    """Picture, start, counts, when to pick it, what was measured, example."""
    text = page.read_text()
    assert page.stem == "hybrids" or re.match(r"# .+\n\n(.+\n\n)?```\n", text)  # the formula
    sits = text.index("\n**Where it sits**\n\n```\n")
    assert sits < text.index("\n```\n", sits + 25)
    for part in ("**Start**", "**Measured**: ", "\n<!-- measured | ", "\n```python\n"):
        assert part in text, part
    assert re.search(r"\*\*(Counts|Merging)\*\*", text)
    assert re.search(r"\*\*(When|Pick it)\*\*", text)
    assert "[study](" in text
    for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_names_every_option(kind):
    text = PAGES[kind].read_text() + (OTHERS[kind].read_text() if kind in OTHERS else "")
    words = {word for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", code)}
    assert {field.name for field in dataclasses.fields(jpeft.METHODS[kind])} <= words


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.stem)
def test_what_was_measured_is_what_the_data_say(page, pages):
    assert pages.written(page.read_text(), page) == page.read_text(), "run benchmarks/method_pages.py"


def test_a_figure_changed_by_hand_is_seen(pages):
    text = PAGES["lora"].read_text()
    changed = text.replace("| lora | 46,240 |", "| lora | 46,241 |")
    assert changed != text
    assert pages.written(changed, PAGES["lora"]) == text


class Tokenizer:
    """As transformers' are called."""

    def __call__(self, text, return_tensors=None):
        ids = [1 + ord(letter) % 30 for letter in text.replace(" ", "")][:9]
        return SimpleNamespace(input_ids=np.array([ids])) if return_tensors else {"input_ids": ids}


@pytest.fixture(name="models", scope="module")
def _models():
    return {
        True: jpeft.models.build(BERT, "SEQ_CLS", key=KEY, num_labels=2),
        False: jpeft.models.build(LLAMA, "CAUSAL_LM", key=KEY),
    }


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.stem)
def test_its_example_runs(page, models):
    base = models[page.stem in ENCODERS]
    names = {
        "jpeft": jpeft,
        "jax": jax,
        "jnp": jnp,
        "optax": optax,
        "key": KEY,
        "model": base,
        "tokenizer": Tokenizer(),
    }
    names |= {"input_ids": jnp.ones((1, 20), int), "attention_mask": jnp.ones((1, 20), int)}
    names |= {"prompt_mask": jnp.arange(20)[None] < 16, "segment_ids": jnp.arange(20)[None] // 10 + 1}
    names["loss"] = lambda trainable: sum((leaf**2).sum() for leaf in jax.tree.leaves(trainable))
    if page.stem == "adapter_fusion":
        names |= _trained_apart(base)
    for code in _blocks(page):
        exec(code, names)
    made = [value for value in names.values() if isinstance(value, type(base)) and value is not base]
    assert made
    for model in made:
        assert jpeft.summary(model).trainable > 0
        assert np.isfinite(model(names["input_ids"], names["attention_mask"])).all()


def test_the_page_about_composing_runs(models):
    names = {"jpeft": jpeft, "key": KEY, "model": models[False]}
    exec(_blocks("docs/composing.md")[0], names)
    assert [row.name for row in jpeft.summary(names["model"]).rows] == ["prompt_tuning", "lora"]


def test_the_page_of_concepts_runs(models):
    class MyDense(nnx.Module):
        def __init__(self):
            self.w, self.b = nnx.Param(jnp.eye(3)), nnx.Param(jnp.ones(3))

        def __call__(self, x):
            return x @ self.w[...] + self.b[...]

    class MyEinsum(nnx.Module):
        def __init__(self):
            self.w, self.einsum_str = nnx.Param(jnp.eye(3)), "...i,io->...o"

        def __call__(self, x):
            return jnp.einsum(self.einsum_str, x, self.w[...])

    t5 = jpeft.models.build(T5, "SEQ_2_SEQ_LM", key=KEY)
    names = {"jpeft": jpeft, "optax": optax, "MyDense": MyDense, "MyEinsum": MyEinsum, "t5": t5}
    names["model"] = jpeft.adapt(models[False], jpeft.LoRA(), key=KEY)
    names |= dict.fromkeys(("input_ids", "attention_mask", "decoder_input_ids"), jnp.ones((1, 6), int))
    names |= dict.fromkeys(("segment_ids", "decoder_segment_ids"), jnp.arange(6)[None] // 3 + 1)
    for code in _blocks("docs/concepts.md"):
        exec(code, names)
    assert names["logits"].shape == (1, 6, T5["vocab_size"])
    assert names["tx"].init(names["trainable"])
    both = nnx.Sequential(MyDense(), MyEinsum())
    adapted = jpeft.adapt(both, jpeft.LoRA(rank=1, targets=["layers.0", "layers.1"]), key=KEY)
    assert jpeft.summary(adapted).trainable == 2 * 6


def _blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def _trained_apart(base):
    """The leaves of two adapters that were each trained by itself."""
    methods = {"nli": jpeft.Pfeiffer(), "sentiment": jpeft.Pfeiffer(reduction_factor=8)}
    found = {}
    for name, method in methods.items():
        leaves = jpeft.partition(jpeft.adapt(base, method, name=name, key=KEY))[1]
        found[f"trained_{name}"] = {path: leaf + 0.1 for path, leaf in leaves.items()}
    return found
