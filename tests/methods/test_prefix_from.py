# SPDX-License-Identifier: Apache-2.0
"""A prefix that starts as a text: the base behind that text, peft's own start, and what is refused."""

import jax
import numpy as np
import peft
import peft_oracle
import pytest
import subjects
import torch
import virtual_oracle
from contracts.models import BERT, LLAMA, VOCAB
from virtual_oracle import run

import jpeft

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
TEXT = RNG.integers(5, VOCAB, (1, 3))
IDS = RNG.integers(5, VOCAB, (2, 6))
METHOD = jpeft.PrefixTuning(num_tokens=3, shift_positions=True)
#: Causal models with rotary and with learned positions, with fewer key heads than query heads, scanned and unrolled.
CAUSAL = {
    "llama": LLAMA,
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 16},
}


def table(model, name="prefix_tuning"):
    return np.asarray(jpeft.partition(model)[1][f"adapters/{name}/prefix"])


@pytest.mark.parametrize("name, options", [("llama", {}), ("llama", {"remat": "full", "unroll": True}), ("gpt2", {})])
def test_it_begins_as_the_base_behind_the_text(name, options):
    """Logits of a text, and of what stands above another adapter, whose effect on keys and values counts in."""
    base = jpeft.models.build(CAUSAL[name], "CAUSAL_LM", key=KEY, **options)
    places = ["c_attn"] if name == "gpt2" else ["k_proj", "v_proj"]
    base = subjects.fill(jpeft.adapt(base, jpeft.LoRA(rank=2, targets=places), key=KEY))
    model = jpeft.prefix_from(base, METHOD, TEXT, key=KEY)
    whole = np.concatenate([np.repeat(TEXT, 2, 0), IDS], 1)
    assert subjects.error(run(model, IDS), run(base, whole)[:, 3:]) < subjects.FLOAT32


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_it_is_the_start_of_peft(family):
    """`peft.initialize_kv_prefix_from_past_key_values` of transformers' cache."""
    ids = peft_oracle.IDS[2:, :3]
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    other = virtual_oracle.real(family, config)
    with torch.no_grad():
        past = other.get_base_model()(torch.tensor(ids), use_cache=True).past_key_values
    theirs = peft.initialize_kv_prefix_from_past_key_values(other, past_key_values=past).numpy()
    ours = table(jpeft.prefix_from(peft_oracle.jax_model(family), METHOD, ids, key=KEY))
    assert subjects.error(ours, theirs.reshape(ours.shape)) < subjects.FLOAT32


def test_chosen_layers_of_an_encoder_and_a_name():
    """Their keys and values stand at the layers' own places in the table; by a caller's own call."""
    base = jpeft.models.build(BERT, "TOKEN_CLS", key=KEY)
    whole = table(jpeft.prefix_from(base, jpeft.PrefixTuning(num_tokens=3), TEXT, key=KEY))
    some = jpeft.PrefixTuning(num_tokens=3, layers=[1], gate=True)
    model = jpeft.prefix_from(base, some, {"ids": TEXT}, key=KEY, name="own", run=lambda m, batch: m(batch["ids"]))
    np.testing.assert_array_equal(table(model, "own")[:, 2:4], whole[:, 2:4])


def test_both_sides_of_an_encoder_decoder():
    """Without padding the encoder's are those of its text, and the decoder's of its own."""
    shape = {
        "model_type": "t5",
        "vocab_size": VOCAB,
        "d_model": 8,
        "d_kv": 4,
        "num_heads": 2,
        "d_ff": 12,
        "num_layers": 2,
    }
    base = jpeft.models.build(shape, "SEQ_2_SEQ_LM", key=KEY)
    both = {"input_ids": TEXT, "decoder_input_ids": IDS[:1, :3]}
    found = table(jpeft.prefix_from(base, jpeft.PrefixTuning(num_tokens=3), both, key=KEY))
    assert found.shape == (3, 8, 2, 4)
    other = table(jpeft.prefix_from(base, jpeft.PrefixTuning(num_tokens=3), both | {"input_ids": IDS[:1, 3:]}, key=KEY))
    same = np.abs(found - other).reshape(3, 8, -1).max((0, 2)) == 0
    assert same.sum() == 2  # the decoder's first layer, whose keys and values no encoder has reached


@pytest.mark.parametrize(
    "method, text, match",
    [
        (jpeft.LoRA(), TEXT, "prefix_from starts a jpeft.PrefixTuning, got LoRA"),
        (jpeft.PrefixTuning(num_tokens=3, projection=True), TEXT, "cannot start as those of a text"),
        (jpeft.PrefixTuning(num_tokens=3, init="zero"), TEXT, "must be 'normal', got 'zero'"),
        (METHOD, IDS[:, :3], "has 3 keys in 2 rows, and a prefix of 3 tokens starts as one row"),
        (METHOD, IDS[:1], "has 6 keys in 1 rows, and a prefix of 3 tokens"),
        (METHOD, {"input_ids": TEXT, "attention_mask": [[0, 1, 1]]}, r"has padding \(attention_mask holds 0\)"),
        (METHOD, [5, 6, 7], r"one row of ids, \[1, num_tokens\], .*; got list of shape \(3,\) and int64"),
        (METHOD, "a text", r"got str of shape \(\) and <U6"),
    ],
)
def test_what_is_no_text_of_that_length_is_refused(method, text, match):
    base = jpeft.models.build(LLAMA, "CAUSAL_LM", key=KEY)
    with pytest.raises((TypeError, ValueError), match=match):
        jpeft.prefix_from(base, method, text, key=KEY)


def test_a_text_behind_another_prefix_is_refused():
    base = jpeft.adapt(jpeft.models.build(LLAMA, "CAUSAL_LM", key=KEY), METHOD, key=KEY)
    with pytest.raises(ValueError, match=r"has 6 keys in 1 rows.*without another prefix or prompt"):
        jpeft.prefix_from(base, METHOD, TEXT, key=KEY, name="second")
