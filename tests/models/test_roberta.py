# SPDX-License-Identifier: Apache-2.0
"""RoBERTa's own: positions that count no padding, a head of two layers, and what its Config refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from llama_reference import assert_close
from zoo_reference import SEQ, batch, build, outputs_of, torch_model
from zoo_subjects import ROBERTA

import jpeft
from jpeft import models
from jpeft.models.bert import Config

PAD = 4
CONFIG = dict(ROBERTA.config) | {"pad_token_id": PAD}


def test_positions_and_embeddings_are_transformers(tmp_path):
    """Given embeddings count all places; given positions start at 0, where transformers' start behind the padding's."""
    theirs = torch_model(CONFIG, "FEATURE_EXTRACTION", ROBERTA.classes)
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((2, SEQ, 24)).astype(np.float32)
    expected = theirs(inputs_embeds=torch.tensor(embeds))
    hidden = ours.hidden(inputs_embeds=embeds)
    assert_close(hidden, expected.last_hidden_state.detach().numpy())
    assert_close(ours.pooled(hidden), expected.pooler_output.detach().numpy())
    ids, positions = rng.integers(0, 53, (2, SEQ)), rng.integers(0, 14, (2, SEQ))
    expected = theirs(torch.tensor(ids), position_ids=torch.tensor(positions + PAD + 1)).last_hidden_state
    assert_close(outputs_of(ours, input_ids=ids, positions=positions), expected.detach().numpy())


def test_packed_segments_are_separate_rows():
    """With padding inside of them, which has a position of its own."""
    model = build(CONFIG, "TOKEN_CLS")
    ids = batch(ROBERTA)["input_ids"]
    ids[0, 3], ids[1, 5], ids[2, -3:] = PAD, PAD, PAD
    segments = np.array([[1] * 5 + [2] * 3 + [3] * 5] * 3)
    packed = outputs_of(model, input_ids=ids, segment_ids=segments)
    for segment in (1, 2, 3):
        here = segments[0] == segment
        assert_close(packed[:, here], outputs_of(model, input_ids=ids[:, here]))


def test_a_prompt_stands_at_the_first_positions():
    """Its tokens and the text's are counted together: as embeddings of a longer text, where none of it is padding."""
    model = build(CONFIG, "TOKEN_CLS")
    adapted = jpeft.adapt(model, jpeft.PromptTuning(num_tokens=3), key=jax.random.key(0))
    ids = np.random.default_rng(0).integers(PAD + 1, 53, (2, 10))
    prompt = next(iter(jpeft.partition(adapted)[1].values()))
    embeds = jnp.concatenate([jnp.broadcast_to(prompt, (2, 3, 24)), model.embeddings.words(ids)], 1)
    assert_close(adapted(ids), np.asarray(model(inputs_embeds=embeds))[:, 3:])
    with pytest.raises(ValueError, match="12 tokens behind 3 virtual ones are more than the 14 positions"):
        adapted(np.full((1, 12), 7))


def test_only_the_head_is_left_to_train_where_the_base_is_frozen():
    """The head of two layers is one thing: trained whole, left out of "all-linear", kept in floats."""
    model = jpeft.adapt(build(CONFIG, "SEQ_CLS"), jpeft.LoRA(targets="all-linear"), key=jax.random.key(0))
    trained = jpeft.partition(model)[1]
    head = {path for path in trained if path.startswith("classifier/")}
    assert len(head) == 4
    assert all("/saved/" in path for path in head)
    assert not any("/saved/" in path for path in trained.keys() - head)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pad_token_id": None}, "a roberta model counts positions .* needs a pad_token_id, .*; got pad_token_id=None"),
        ({"max_position_embeddings": 5}, "more positions than that; got pad_token_id=4 and max_position_embeddings=5"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"adapter_size": 3}, "not supported: adapter_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Config.from_hf(CONFIG | changes)


def test_wrong_calls_are_refused():
    model = build(CONFIG, "SEQ_CLS")
    with pytest.raises(ValueError, match="15 tokens are more than the 14 positions"):
        model(np.zeros((1, 15), int))
    with pytest.raises(ValueError, match="SEQ_CLS of a roberta model has no pooler; it has one for MULTIPLE_CHOICE"):
        model.pooled(jnp.zeros((3, SEQ, 24)))
