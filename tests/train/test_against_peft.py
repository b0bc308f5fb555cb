# SPDX-License-Identifier: Apache-2.0
"""The same start, the same batches, no dropout: the losses of training are peft's."""

import json

import numpy as np
import optax
import pytest

import jpeft
from jpeft.train.losses import SUMS
from jpeft.train.step import begin, make_step

RATE, UPDATES, ROWS = 5e-4, 50, 32

#: Float32 on both sides, in different orders of summation, over 50 updates of Adam.
LOSS_ATOL = 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_first_losses_on_sst2_are_pefts(data, minilm, tmp_path):
    batches = _batches(data, minilm)
    torch_losses = _train_peft(minilm, batches, tmp_path / "start")
    model = jpeft.models.load(minilm, "SEQ_CLS", num_labels=2)
    model = jpeft.import_peft(model, tmp_path / "start")
    graphdef, trainable, frozen = jpeft.partition(model)
    tx = optax.adamw(RATE, weight_decay=0.0)
    state, step = begin(tx, trainable), make_step(graphdef, SUMS["SEQ_CLS"], tx)
    losses = []
    for batch in batches:
        state, metrics = step(state, frozen, {name: value[None] for name, value in batch.items()}, None)
        losses.append(float(metrics.loss))
    assert np.mean(torch_losses[-10:]) < np.mean(torch_losses[:10]) - 1e-3  # it learns: later losses tell of updates
    np.testing.assert_allclose(losses, torch_losses, atol=LOSS_ATOL, rtol=0)


def _batches(data, minilm):
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in (data / "sst2/train_sentences.jsonl").read_text().splitlines()]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[: UPDATES * ROWS]]
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    chunks = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    return [_batch(tokenizer, chunk) for chunk in chunks]


def _batch(tokenizer, rows):
    texts = [row["sentence"] for row in rows]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=48, return_tensors="np")
    batch = {name: encoded[name].astype(np.int32) for name in ("input_ids", "attention_mask")}
    return {**batch, "labels": np.array([row["label"] for row in rows], np.int32)}


def _train_peft(minilm, batches, start):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        minilm, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(base, config)
    model.save_pretrained(start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    losses = []
    for batch in batches:
        loss = model(**{name: torch.from_numpy(value).long() for name, value in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
