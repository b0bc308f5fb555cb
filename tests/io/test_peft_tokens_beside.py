# SPDX-License-Identifier: Apache-2.0
"""A LoRA with trained tokens beside it: one adapter, one folder of PEFT's, and what the real peft makes of it."""

import json

import jax
import numpy as np
import peft
import peft_oracle as oracle
import pytest
import subjects
from peft_oracle import config_of, real_outputs, tensors
from virtual_oracle import run

import jpeft

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

#: float32 against float32 at unit scale, through three layers.
ATOL = 1e-5
KEY = jax.random.key(0)
TOKENS = tuple(dict.fromkeys((7, int(oracle.IDS[2, 1]), 3, int(oracle.IDS[0, 0]))))
#: family -> (targets, the input's table)
FAMILIES = {
    "llama": (["q_proj", "v_proj"], "model.embed_tokens"),
    "llama tied": (["q_proj", "down_proj"], "model.embed_tokens"),
    "bert cls": (["query", "value"], "bert.embeddings.word_embeddings"),
    "gpt2": (["c_attn"], "transformer.wte"),
    "t5": (["q", "v"], "shared"),
}


def lora(family, tokens=TOKENS, **options):
    return jpeft.LoRA(rank=2, alpha=3, targets=FAMILIES[family][0], trainable_token_indices=tokens, **options)


def both(family):
    alone = jpeft.LoRA(rank=2, alpha=3, targets=FAMILIES[family][0])
    return alone | jpeft.TrainableTokens(TOKENS, modules_to_save=())


def adapted(family, method):
    return subjects.fill(jpeft.adapt(oracle.jax_model(family), method, key=KEY))


def outputs(model):
    return oracle.seen(run(model, **oracle.inputs_of(model)))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


EXPORTS = [
    ("llama tied", lora("llama tied")),
    ("bert cls", both("bert cls")),
    slow("t5", lora("t5")),
    slow("llama", lora("llama", {"embed_tokens": TOKENS[1:]}, bias="lora_only")),
    slow("llama tied", both("llama tied")),
    slow("gpt2", lora("gpt2")),
]


@pytest.mark.parametrize("family, method", EXPORTS)
def test_real_peft_computes_the_same_from_our_files(family, method, tmp_path):
    model = adapted(family, method)
    jpeft.export_peft(model, tmp_path / "adapter")
    real, loaded = oracle.load_real(family, tmp_path / "adapter")
    assert (loaded.unexpected_keys, loaded.missing_keys) == ([], [])
    logits = real_outputs(real, family)
    np.testing.assert_allclose(outputs(model), logits, atol=ATOL, rtol=0)

    back = jpeft.import_peft(oracle.jax_model(family), tmp_path / "adapter")
    np.testing.assert_array_equal(outputs(back), outputs(model))
    jpeft.export_peft(back, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()

    assert subjects.error(outputs(jpeft.merge(model)), outputs(model)) < 1e-5
    plain = {path: leaf for path, leaf in jpeft.partition(model)[1].items() if not path.endswith("rows")}
    start = jpeft.partition(adapted(family, method))
    assert len(plain) == len(start[1]) - 1
    own = jpeft.partition(jpeft.adapt(oracle.jax_model(family), method, key=KEY))[1]
    without = jpeft.combine(start[0], {path: plain.get(path, own[path]) for path in own}, start[2])
    assert subjects.error(outputs(without), logits) > 1e-3, "the tokens must count"


IMPORTS = [
    ("llama tied", [*TOKENS]),
    ("bert cls", {"word_embeddings": [*TOKENS]}),
    slow("llama tied", {"embed_tokens": [*TOKENS], "lm_head": [*TOKENS]}),
    slow("llama", [*TOKENS]),
    slow("gpt2", {"wte": [*TOKENS]}),
    slow("t5", [*TOKENS]),
]


@pytest.mark.parametrize("family, tokens", IMPORTS)
def test_we_compute_the_same_from_real_peft_files(family, tokens, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=FAMILIES[family][0], trainable_token_indices=tokens)
    real = oracle.train_real(family, config, tmp_path / "real", noise=0.1)
    model = jpeft.import_peft(oracle.jax_model(family), tmp_path / "real")
    np.testing.assert_allclose(outputs(model), real_outputs(real, family), atol=ATOL, rtol=0)
    jpeft.export_peft(model, tmp_path / "ours")
    theirs, ours = tensors(tmp_path / "real"), tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[key], err_msg=key)
    expected = config_of(tmp_path / "real") | {"trainable_token_indices": {FAMILIES[family][1]: [*TOKENS]}}
    found = config_of(tmp_path / "ours")
    assert {**found, "target_modules": 0, "modules_to_save": 0, "base_model_name_or_path": 0} == {
        **expected,
        "target_modules": 0,
        "modules_to_save": 0,
        "base_model_name_or_path": 0,
    }


def test_it_is_one_adapter_of_two_methods():
    model = adapted("llama tied", lora("llama tied"))
    trainable = jpeft.partition(model)[1]
    assert trainable["embed_tokens/adapters/lora/rows"].shape == (len(TOKENS), 16)
    rows = {row.method.kind: row for row in jpeft.summary(model).rows}
    assert {row.name for row in rows.values()} == {"lora"}
    assert rows["trainable_tokens"].trainable == rows["trainable_tokens"].changed == 16 * len(TOKENS)
    assert rows["lora"].trainable == 3 * 2 * ((16 + 16) + (20 + 16))
    assert jpeft.summary(model).trainable == sum(leaf.size for leaf in trainable.values())
    base = oracle.jax_model("llama tied")
    np.testing.assert_array_equal(outputs(jpeft.disable(model, "lora")), outputs(base))
    np.testing.assert_array_equal(outputs(jpeft.adapt(base, lora("llama tied"), key=KEY)), outputs(base))
    named = jpeft.adapt(base, lora("llama tied"), key=KEY, name="mine")
    assert {row.name for row in jpeft.summary(named).rows} == {"mine"}


def test_a_card_counts_both(tmp_path):
    jpeft.export_peft(adapted("llama", lora("llama")), tmp_path)
    total = jpeft.summary(adapted("llama", lora("llama"))).trainable
    assert f"{total:,}" in (tmp_path / "README.md").read_text()


def test_an_eva_start_leaves_the_tokens_as_they_are():
    batches = [{"input_ids": oracle.IDS, "attention_mask": oracle.MASK}]
    model = jpeft.eva(oracle.jax_model("llama"), lora("llama"), batches, key=KEY)
    table = jpeft.partition(oracle.jax_model("llama"))[2]["embed_tokens/embedding"]
    np.testing.assert_array_equal(jpeft.partition(model)[1]["embed_tokens/adapters/lora/rows"], table[np.array(TOKENS)])


WRONG = [
    ("abc", TypeError, "LoRA takes the ids of tokens, got 'abc'"),
    ([3, 3], ValueError, "LoRA trains one row for each token that is named, once; got 3 twice"),
    ({}, ValueError, "trainable_token_indices names no table; leave it out"),
    ({"embed_tokens": [-1]}, ValueError, "token index must be a whole number of at least 0, got -1"),
    ({"embed": [1]}, ValueError, "'embed' matches no projection"),
    ({"lm_head": [1]}, ValueError, "trains rows of an embedding table, which lm_head is not"),
    ([48], ValueError, "has 48 rows, so there is no token 48"),
]


@pytest.mark.parametrize("tokens, error, message", WRONG, ids=str)
def test_a_wrong_option_is_refused(tokens, error, message):
    with pytest.raises(error, match=message):
        jpeft.adapt(oracle.jax_model("llama"), lora("llama", tokens), key=KEY)


def test_what_one_folder_cannot_hold_is_refused(tmp_path):
    base = oracle.jax_model("llama")
    method = jpeft.LoRA(rank=2, targets=["q_proj", "embed_tokens"], trainable_token_indices=[1])
    with pytest.raises(ValueError, match=r"embed_tokens already has an adapter 'lora'; .* leave it out of ta"):
        jpeft.adapt(base, method, key=KEY)
    apart = jpeft.TrainableTokens([1]) | jpeft.LoRA(rank=2, targets=["embed_tokens"])
    with pytest.raises(ValueError, match="embed_tokens has parts of lora and trainable_tokens, and in PEFT's one"):
        jpeft.export_peft(jpeft.adapt(base, apart, key=KEY), tmp_path)
    saved = jpeft.LoRA(targets=["query"], modules_to_save=()) | jpeft.TrainableTokens([1])
    with pytest.raises(
        ValueError, match=r"LoRA that trains classifier whole there; adapt with TrainableTokens\(\.\.\."
    ):
        jpeft.export_peft(jpeft.adapt(oracle.jax_model("bert cls"), saved, key=KEY), tmp_path)
    with pytest.raises(ValueError, match="has the adapters ia3, trainable_tokens, and a PEFT folder holds one"):
        jpeft.export_peft(jpeft.adapt(base, jpeft.IA3() | jpeft.TrainableTokens([1]), key=KEY), tmp_path)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ({"embed_tokens": [1], "lm_head": [2]}, r"the tokens \[2\] of lm_head and \[1\] of model.embed_tokens, and in"),
        ({"lm_head": [2]}, r"the tokens \[2\] of lm_head and None of model.embed_tokens"),
        ({"wte": [2]}, "trainable_token_indices names 'wte', which this model does not have"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(tokens, message, tmp_path):
    jpeft.export_peft(jpeft.adapt(oracle.jax_model("llama tied"), lora("llama tied"), key=KEY), tmp_path)
    config = config_of(tmp_path) | {"trainable_token_indices": tokens}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        jpeft.import_peft(oracle.jax_model("llama tied"), tmp_path)
