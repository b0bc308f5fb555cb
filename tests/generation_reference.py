# SPDX-License-Identifier: Apache-2.0
"""transformers' tiny models that write, and the prompts that they and jpeft's are given."""

import numpy as np
from llama_reference import MISTRAL, TINY
from llama_reference import torch_model as llama_torch_model
from zoo_reference import torch_model as zoo_torch_model
from zoo_subjects import GPT2, T5

#: Left-padded prompts of 7, 4 and 1 tokens.
MASK = np.arange(7)[None] >= np.array([[0], [3], [6]])
IDS = np.where(MASK, np.random.default_rng(0).integers(3, 53, MASK.shape), 0)


def family(name):
    """transformers' model."""
    if name == "llama":
        return llama_torch_model(TINY)
    if name == "mistral":
        return llama_torch_model(MISTRAL | {"sliding_window": 4})
    subject, task = (GPT2, "CAUSAL_LM") if name == "gpt2" else (T5, "SEQ_2_SEQ_LM")
    changed = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if name == "t5 v1.1" else {}
    return zoo_torch_model(dict(subject.config) | changed, task, subject.classes)
