# SPDX-License-Identifier: Apache-2.0
"""Trained parameters that papers, guides and other libraries print, from shapes alone: no weight is made."""

import jax
import pytest
from flax import nnx

import jpeft
from jpeft import (
    IA3,
    AdapterFusion,
    Compacter,
    Houlsby,
    LoRA,
    LoReFT,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
)
from jpeft.models import bert, distilbert, gpt2

KEY = jax.random.key(0)
BERT = bert.PRESETS["bert-base-uncased"]
THREE_LABELS = {"model_type": "bert", "num_labels": 3}
DISTILBERT = distilbert.PRESETS["distilbert-base-uncased"]
GPT2 = gpt2.PRESETS["gpt2"]
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYWHERE = ["c_attn", "c_proj", "c_fc", "wte"]

#: Model, task, method, numbers trained by the method, and with the head of the task where there is one.
COUNTS = {
    "llama 7b, lora 16": (LLAMA, "CAUSAL_LM", LoRA(rank=16, targets=QKVO), 16_777_216, 0),
    "llama 7b, lora 64": (LLAMA, "CAUSAL_LM", LoRA(rank=64, targets=QKVO), 67_108_864, 0),
    # 33,554,432 weights, and 2 · 32 biases of 64 and of 4096 numbers
    "llama 7b, houlsby 64": (LLAMA, "CAUSAL_LM", Houlsby(reduction_factor=64), 33_554_432 + 2 * 32 * (64 + 4096), 0),
    "llama 7b, prefix 20": (LLAMA, "CAUSAL_LM", PrefixTuning(num_tokens=20), 5_242_880, 0),
    "llama 7b, prompt 100": (LLAMA, "CAUSAL_LM", PromptTuning(num_tokens=100), 409_600, 0),
    "llama 7b, ia3": (LLAMA, "CAUSAL_LM", IA3(), 614_400, 0),
    "bert, lora 8": (THREE_LABELS, "SEQ_CLS", LoRA(rank=8, targets=["query", "value"]), 294_912, 297_219),
    "bert, prompt 10": (THREE_LABELS, "SEQ_CLS", PromptTuning(num_tokens=10), 7_680, 9_987),
    "bert, prefix 20": (
        THREE_LABELS, "SEQ_CLS", PrefixTuning(num_tokens=20, projection=True, hidden_size=768), 14_780_160, 14_782_467,
    ),
    "bert, pfeiffer": (BERT, None, Pfeiffer(reduction_factor=16), 894_528, 0),
    "bert, houlsby": (BERT, None, Houlsby(reduction_factor=16), 1_789_056, 0),
    "bert, parallel": (BERT, None, ParallelAdapter(reduction_factor=2), 7_091_712, 0),
    "bert, prefix 30": (BERT, None, PrefixTuning(num_tokens=30, projection=True, hidden_size=512), 9_872_384, 0),
    "bert, prefix 30 folded": (BERT, None, PrefixTuning(num_tokens=30), 552_960, 0),
    "bert, ia3": (BERT, None, IA3(placement="adapterhub"), 55_296, 0),
    "bert, unipelt": (BERT, None, jpeft.UniPELT(), 11_083_376, 0),
    "bert, mam": (BERT, None, jpeft.MAM(), 22_493_984, 0),
    "bert, compacter": (BERT, None, Compacter(), 57_088, 0),
    "bert, loreft": (BERT, None, LoReFT(rank=1), 18_444, 0),
    "bert, fusion": (
        BERT, None, Pfeiffer() | Pfeiffer(reduction_factor=64) | AdapterFusion(("pfeiffer", "pfeiffer_2")),
        21_252_096, 0,
    ),
    "distilbert, lora 16": (DISTILBERT, "SEQ_CLS", LoRA(rank=16), 294_912, 887_042),
    "distilbert, prefix 20": (
        DISTILBERT, "SEQ_CLS", PrefixTuning(num_tokens=20, projection=True, hidden_size=768), 7_693_056, 8_285_186,
    ),
    "distilbert, prompt 20": (DISTILBERT, "SEQ_CLS", PromptTuning(num_tokens=20), 15_360, 607_490),
    **{
        f"gpt2, lora {rank}": (GPT2, "CAUSAL_LM", LoRA(rank=rank, targets=EVERYWHERE), 793_924 * rank // 4, 0)
        for rank in (4, 8, 16, 32, 64)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_count(name):
    config, task, method, alone, together = COUNTS[name]

    def make():
        base = jpeft.models.build(config, task or "FEATURE_EXTRACTION", key=KEY)
        return jpeft.adapt(base, method, key=KEY)

    model = nnx.eval_shape(make)
    trainable = jpeft.partition(model)[1]
    assert sum(leaf.size for leaf in trainable.values()) == jpeft.summary(model).trainable == (together or alone)
    assert sum(leaf.size for path, leaf in trainable.items() if "/saved/" not in path) == alone
