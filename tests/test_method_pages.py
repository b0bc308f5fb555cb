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
    assert re.search(r"\*\*(When|Pick it|Measured)\*\*", text)
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
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(code, names)
    made = [value for value in names.values() if isinstance(value, type(base)) and value is not base]
    assert made
    for model in made:
        assert jpeft.summary(model).trainable > 0
        assert np.isfinite(model(names["input_ids"], names["attention_mask"])).all()


def _trained_apart(base):
    """The leaves of two adapters that were each trained by itself."""
    methods = {"nli": jpeft.Pfeiffer(), "sentiment": jpeft.Pfeiffer(reduction_factor=8)}
    found = {}
    for name, method in methods.items():
        leaves = jpeft.partition(jpeft.adapt(base, method, name=name, key=KEY))[1]
        found[f"trained_{name}"] = {path: leaf + 0.1 for path, leaf in leaves.items()}
    return found
