# SPDX-License-Identifier: Apache-2.0
"""A merged model is an ordinary Hugging Face folder: transformers alone computes what the adapted model did."""

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle as oracle
import pytest
import torch

import jpeft

ATOL = 1e-5
#: bfloat16 keeps 8 bits of each weight; logits of unit size through three layers.
BF16_ATOL = 0.2


def moved(model, method):
    graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(model, method, key=jax.random.key(0)))
    rng = np.random.default_rng(3)
    leaves = {path: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in trainable.items()}
    return jpeft.combine(graphdef, leaves, frozen)


@pytest.mark.parametrize("family", ["bert cls", "llama tied", "qwen2", "gpt2", "t5", "vit"])
def test_transformers_computes_the_same(family, tmp_path, monkeypatch):
    targets = ["embed_tokens", "q_proj"] if family == "llama tied" else "all-linear"
    model = moved(oracle.jax_model(family), jpeft.LoRA(rank=3, alpha=5, targets=targets, bias="lora_only"))
    drift = jpeft.export_merged(model, tmp_path / "merged")
    assert drift.logit < ATOL
    monkeypatch.setattr(oracle, "folder", lambda _: tmp_path / "merged")
    with torch.no_grad():
        logits = oracle.torch_outputs(oracle.torch_model(family), oracle.FAMILIES[family][1]).numpy()
    ours = np.array(oracle.jax_outputs(model))
    np.testing.assert_allclose(oracle.seen(ours), oracle.seen(logits), atol=ATOL, rtol=0)


def test_the_drift_of_a_bfloat16_base_is_told(tmp_path, caplog):
    model = jpeft.models.load(oracle.folder("llama"), "CAUSAL_LM", dtype=jnp.bfloat16)
    with caplog.at_level("INFO", "jpeft"):
        drift = jpeft.export_merged(moved(model, jpeft.LoRA(rank=3)), tmp_path)
    assert 0 < drift.logit < BF16_ATOL
    assert f"merging: {drift}" in caplog.text


def test_the_tokenizer_comes_along(tmp_path, minilm):
    model = moved(oracle.jax_model("bert cls"), jpeft.LoRA(rank=3))
    jpeft.export_merged(model, tmp_path / "merged", tokenizer_from=minilm)
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (minilm / "tokenizer.json").read_bytes()


def test_a_model_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter to merge; jpeft\.models\.save writes it as it is"):
        jpeft.export_merged(oracle.jax_model("bert cls"), tmp_path)
