# SPDX-License-Identifier: Apache-2.0
"""Models small enough to train in a second, with tokenizers of their own, and texts that can be learnt."""

import json
import random

import jax
import painted
import pytest

import jpeft

WORDS = "good great fine bad poor dull film plot cast scene the a is was and".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]

BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(SPECIAL + WORDS), "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "hidden_act": "gelu",
    "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.1,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": len(SPECIAL + WORDS), "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip


def _write_tokenizer(folder, ends):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "[CLS] $A [SEP]" if ends else "[CLS] $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"} | (
        {} if ends else {"eos_token": "[SEP]", "bos_token": "[CLS]"}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """Folder of a tiny BERT without a head."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    jpeft.models.save(jpeft.models.build(BERT, key=jax.random.key(0)), folder)
    _write_tokenizer(folder, ends=True)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Folder of a tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    jpeft.models.save(jpeft.models.build(LLAMA, key=jax.random.key(0)), folder)
    _write_tokenizer(folder, ends=False)
    return folder


def _sentences(count, seed):
    """Of 3 to 14 words; labelled by whether a good word or a bad one is among them."""
    rng = random.Random(seed)
    for _ in range(count):
        label = rng.randrange(2)
        words = [rng.choice(WORDS[6:]) for _ in range(rng.randrange(2, 14))]
        words.insert(rng.randrange(len(words)), rng.choice(WORDS[:3] if label else WORDS[3:6]))
        yield {"text": " ".join(words), "label": ("bad", "good")[label]}


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """Folder with train.jsonl (150 rows) and eval.jsonl (61)."""
    folder = tmp_path_factory.mktemp("reviews")
    for name, count, seed in (("train", 150, 0), ("eval", 61, 1)):
        lines = [json.dumps(row) + "\n" for row in _sentences(count, seed)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def classify(bert, reviews, tmp_path):
    """A configuration, as plain values, that trains a classifier in a second or two."""
    return {
        "model": {"path": str(bert), "task": "SEQ_CLS"},
        "data": {"train": str(reviews / "train.jsonl"), "eval": str(reviews / "eval.jsonl"), "num_widths": 2},
        "method": {
            "kind": "lora",
            "rank": 4,
            "alpha": 8,
            "targets": ["query", "value", "word_embeddings"],
            "dropout": 0.1,
        },
        "optimizer": {"lr": 2e-2},
        "train": {"epochs": 1, "batch_size": 16, "log_every": 3},
        "out": str(tmp_path / "run"),
    }


@pytest.fixture
def generate(llama, reviews, tmp_path):
    """The same for a language model."""
    return {
        "model": {"path": str(llama), "task": "CAUSAL_LM"},
        "data": {"train": str(reviews / "train.jsonl"), "eval": str(reviews / "eval.jsonl"), "num_widths": 2},
        "method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "embed_tokens"]},
        "optimizer": {"lr": 2e-2},
        "train": {"epochs": 1, "batch_size": 16, "log_every": 3},
        "out": str(tmp_path / "run"),
    }


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """Folder of a tiny ViT without a head."""
    return painted.write_vit(tmp_path_factory.mktemp("models") / "vit", hidden_dropout_prob=0.1)


@pytest.fixture(scope="session")
def pets(tmp_path_factory):
    """Folder with train/ and validation/ (37 and 14 images of two classes)."""
    folder = tmp_path_factory.mktemp("pets")
    painted.paint(folder / "train", 19, 0)
    (folder / "train" / "red" / "18.png").unlink()
    painted.paint(folder / "validation", 7, 1)
    return folder


@pytest.fixture
def see(vit, pets, tmp_path):
    """A configuration, as plain values, that trains a classifier of images."""
    return {
        "model": {"path": str(vit), "task": "IMAGE_CLS"},
        "data": {"train": str(pets / "train"), "eval": str(pets / "validation")},
        "method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"], "dropout": 0.1},
        "optimizer": {"lr": 2e-2},
        "train": {"epochs": 2, "batch_size": 8, "log_every": 3},
        "out": str(tmp_path / "run"),
    }


@pytest.fixture(scope="session")
def confined():
    """A machine on which the sandbox runs code at all; elsewhere it refuses, and says which layer is missing."""
    from jpeft.train.sandbox.box import Sandbox, Unconfined

    try:
        return Sandbox().layers()
    except Unconfined as error:
        pytest.skip(f"absent: {error}")
