# SPDX-License-Identifier: Apache-2.0
"""The padding token's row of a table, where the model reads that token: held, as in torch, and nothing else is."""

import jax
import numpy as np
import peft
import peft_leaves
import peft_oracle as oracle
import pytest
import subjects
from contracts.table import QUICK

import jpeft

#: float32 against torch's, through three layers of unit size.
LAYERS = 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_what_all_tokens_share_learns_of_padding_that_is_read(dora):
    """BERT's classes are read off the first token, which in a row padded on the left is padding."""
    assert oracle.MASK[1, 0] == 0
    method = (jpeft.DoRA if dora else jpeft.LoRA)(rank=2, alpha=3, targets=["word_embeddings"], modules_to_save=())
    model = subjects.fill(jpeft.adapt(oracle.jax_model("bert cls"), method, key=jax.random.key(0)))
    with oracle.quiet():
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["word_embeddings"], use_dora=dora)
        other = peft.get_peft_model(oracle.torch_model("bert cls"), config).eval()
    peft_leaves.give(model, other)
    graphdef, trainable, frozen = jpeft.partition(model)

    def loss(trainable):
        out = jpeft.combine(graphdef, trainable, frozen)(oracle.IDS, oracle.MASK)
        return (oracle.cotangent(out) * out).sum()

    gradients = jax.jit(jax.grad(loss), compiler_options=QUICK)(trainable)
    oracle.torch_loss(other, "bert cls").backward()
    errors = peft_leaves.differences(model, other, gradients, "grad")
    assert max(errors.values()) < LAYERS, errors
    (rows,) = (np.asarray(value) for path, value in gradients.items() if path.endswith("/A"))
    assert not rows[0].any()
    assert rows[oracle.IDS[0, 0]].any()
