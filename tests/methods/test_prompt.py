# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning against peft and NumPy, its starts, its places in padded and packed rows, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_oracle
import pytest
import subjects
import torch
import virtual_oracle
from contracts.models import BERT, LLAMA, MODELS, VOCAB
from contracts.table import IDS
from flax import nnx
from virtual_oracle import run

import jpeft

KEY = jax.random.key(0)


def adapted(model, **options):
    return subjects.fill(jpeft.adapt(model, jpeft.PromptTuning(**{"num_tokens": 3, **options}), key=KEY))


def prompt_of(model):
    return np.asarray(jpeft.partition(model)[1]["adapters/prompt_tuning/prompt"])


@pytest.mark.parametrize("family", ["bert cls", "bert tokens", "bert", "llama", "llama tied", "mistral", "qwen3"])
def test_outputs_and_gradients_are_those_of_peft(family):
    """Rows padded on either side; BERT's classes are read off the first virtual token, the prompt learns of both."""
    config = peft.PromptTuningConfig(task_type=peft_oracle.FAMILIES[family][1], num_virtual_tokens=3)
    virtual_oracle.compare(family, jpeft.PromptTuning(num_tokens=3), config, virtual_oracle.PROMPT)


def test_llamas_classes_are_read_off_the_last_token_where_peft_reads_padding():
    """peft gives transformers embeddings in the place of tokens, which then takes the last place, padding or not."""
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    method = jpeft.PromptTuning(num_tokens=3)
    model, other = virtual_oracle.compare("llama cls", method, config, virtual_oracle.PROMPT, rows=slice(1, None))
    ids, mask = peft_oracle.IDS[:1], peft_oracle.MASK[:1]
    with torch.no_grad():
        padded = other(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
        alone = other(input_ids=torch.tensor(ids[:, :5]), attention_mask=torch.tensor(mask[:, :5])).logits
    assert subjects.error(run(model, ids, mask), alone) < virtual_oracle.TORCH
    assert subjects.error(padded, alone) > 0.1


def test_outputs_and_gradients_are_the_formula():
    with jax.enable_x64(True):
        model = subjects.in_float64(adapted(MODELS["foreign"].build()))
        graphdef, trainable, frozen = jpeft.partition(model)
        base = subjects.as64(frozen)

        def formula(prompt):
            return virtual_oracle.foreign64(base, IDS, prompt=prompt["adapters/prompt_tuning/prompt"])

        assert subjects.error(run(model, IDS), formula(subjects.as64(trainable))) < subjects.FLOAT64
        gradient = jax.jit(jax.grad(lambda t: jnp.sin(jpeft.combine(graphdef, t, frozen)(IDS)).sum()))(trainable)
        expected = subjects.complex_step(lambda t: np.sin(formula(t)).sum(), subjects.as64(trainable))
        assert subjects.error(*(g["adapters/prompt_tuning/prompt"] for g in (gradient, expected))) < 1e-13


# Places.


def test_one_prompt_serves_a_packed_row():
    """Each example as by itself: the prompt sees itself alone, and positions count from it in every segment."""
    model = adapted(jpeft.models.build(LLAMA, "CAUSAL_LM", key=KEY))
    ids = np.random.default_rng(0).integers(1, 11, (2, 9))
    segments = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 5, 5]])
    packed = run(model, ids, segment_ids=segments)
    for row in range(2):
        for segment in np.unique(segments[row]):
            own = segments[row] == segment
            assert subjects.error(packed[row][own], run(model, ids[row][own][None])[0]) < subjects.FLOAT32


@pytest.mark.parametrize("config, task", [(BERT, "TOKEN_CLS"), (LLAMA, "CAUSAL_LM")], ids=["bert", "llama"])
def test_the_text_stands_behind_the_prompt(config, task):
    """Positions given or not, the real ones go up by the prompt's length: as inputs_embeds of the base say it too."""
    base = jpeft.models.build(config, task, key=KEY)
    model = adapted(base, num_tokens=2, modules_to_save=())
    table = base.embeddings.word_embeddings if config is BERT else base.embed_tokens
    whole = jnp.concatenate([jnp.broadcast_to(prompt_of(model), (3, 2, 8)), table(IDS)], 1)
    assert subjects.error(run(model, IDS), run(base, inputs_embeds=whole)[:, 2:]) < subjects.FLOAT32
    positions = np.array([[4, 0, 2, 1, 3, 5]] * 3)
    moved = np.concatenate([np.tile([0, 1], (3, 1)), positions + 2], 1)
    got, expected = run(model, IDS, positions=positions), run(base, inputs_embeds=whole, positions=moved)[:, 2:]
    assert subjects.error(got, expected) < subjects.FLOAT32


def test_token_types_go_on_behind_the_prompt():
    base = jpeft.models.build(BERT, "SEQ_CLS", key=KEY)
    model, types = adapted(base, num_tokens=2, modules_to_save=()), np.array([[0, 0, 1, 1, 1, 0]] * 3)
    whole = jnp.concatenate([jnp.broadcast_to(prompt_of(model), (3, 2, 8)), base.embeddings.word_embeddings(IDS)], 1)
    expected = run(base, inputs_embeds=whole, token_type_ids=np.pad(types, ((0, 0), (2, 0))))
    assert subjects.error(run(model, IDS, token_type_ids=types), expected) < subjects.FLOAT32


LEARNED_POSITIONS = {
    "bert": (BERT, "TOKEN_CLS"),
    "distilbert": (
        {
            "model_type": "distilbert",
            "vocab_size": VOCAB,
            "dim": 8,
            "n_layers": 1,
            "n_heads": 2,
            "hidden_dim": 12,
            "max_position_embeddings": 16,
        },
        "TOKEN_CLS",
    ),
    "gpt2": (
        {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16},
        "CAUSAL_LM",
    ),
}


@pytest.mark.parametrize("family", LEARNED_POSITIONS)
def test_more_positions_than_the_model_has_are_refused(family):
    config, task = LEARNED_POSITIONS[family]
    model = adapted(jpeft.models.build(config, task, key=KEY), num_tokens=11)
    with pytest.raises(ValueError, match=r"6 tokens behind 11 virtual ones are more than the 16 .* to 5 tokens"):
        model(IDS)
    assert np.isfinite(run(model, IDS[:, :5])).all()


def test_a_prompt_in_front_of_a_prompt():
    base = MODELS["foreign"].build()
    both = subjects.fill(
        jpeft.adapt(base, jpeft.PromptTuning(num_tokens=2) | jpeft.PromptTuning(num_tokens=1), key=KEY)
    )
    leaves = jpeft.partition(both)[1]
    prompts = [leaves[f"adapters/{name}/prompt"] for name in ("prompt_tuning_2", "prompt_tuning")]
    flat = subjects.as64(jpeft.partition(base)[2])
    expected = virtual_oracle.foreign64(flat, IDS, prompt=np.concatenate(prompts))
    assert subjects.error(run(both, IDS), expected) < subjects.FLOAT32


# Starts.


@pytest.mark.parametrize("init, spread", [("random", 1.0), ("uniform", 12**-0.5)])
def test_the_random_starts(init, spread):
    model = jpeft.models.build(LLAMA, "CAUSAL_LM", key=KEY)
    prompt = prompt_of(jpeft.adapt(model, jpeft.PromptTuning(num_tokens=900, init=init), key=KEY))
    assert abs(prompt.mean()) < 4 * spread / prompt.size**0.5
    assert abs(prompt.std() / spread - 1) < 0.05
    assert (np.abs(prompt) <= 0.5).all() == (init == "uniform")


@pytest.mark.parametrize("name", ["foreign", "bert", "llama", "tied llama"])
def test_a_prompt_of_words_has_rows_of_the_word_table(name):
    base = MODELS[name].build()
    path = {"foreign": "embed/embedding", "bert": "embeddings/word_embeddings/embedding"}
    table = np.asarray(jpeft.partition(base)[2][path.get(name, "embed_tokens/embedding")])

    def start(**options):
        return prompt_of(jpeft.adapt(base, jpeft.PromptTuning(**options), key=KEY))

    np.testing.assert_array_equal(start(num_tokens=5, init="text", token_ids=[7, 2]), table[[7, 2, 7, 2, 7]])
    np.testing.assert_array_equal(start(num_tokens=2, init="text", token_ids=[7, 2, 9]), table[[7, 2]])
    drawn = start(num_tokens=40, init="vocabulary")
    which = [np.flatnonzero((table == row).all(1))[0] for row in drawn]
    assert len(set(which)) > 5
    labels = start(num_tokens=4, init="class_labels", token_ids=[3, [5, 8]])
    np.testing.assert_allclose(labels[:2], [table[3], (table[5] + table[8]) / 2], rtol=1e-6)
    assert all((table == row).all(1).any() for row in labels[2:])


def test_peft_cuts_and_repeats_a_text_alike():
    """Its own start, by a tokenizer of ours."""
    model = peft_oracle.jax_model("llama")
    words = peft_oracle.torch_model("llama").get_input_embeddings()
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=7,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="any",
        tokenizer_name_or_path="none",
        token_dim=16,
        num_transformer_submodules=1,
    )
    ids = [4, 40, 9]
    with pytest.MonkeyPatch.context() as patch:
        tokenizer = type("Auto", (), {"from_pretrained": staticmethod(lambda *a, **k: lambda text: {"input_ids": ids})})
        patch.setattr("transformers.AutoTokenizer", tokenizer)
        theirs = peft.PromptEmbedding(config, words).embedding.weight.detach().numpy()
    ours = jpeft.adapt(model, jpeft.PromptTuning(num_tokens=7, init="text", token_ids=ids), key=KEY)
    np.testing.assert_array_equal(prompt_of(ours), theirs)


# Counts and refusals.


@pytest.mark.parametrize(
    "preset, tokens, trained", [("bert-base-uncased", 10, 7_680 + 2_307), ("llama-2-7b", 100, 409_600)]
)
def test_counts(preset, tokens, trained):
    config, task = virtual_oracle.SHAPES[preset]

    def build():
        base = jpeft.models.build(config, task, key=KEY)
        return jpeft.adapt(base, jpeft.PromptTuning(num_tokens=tokens, init="vocabulary"), key=KEY)

    model = virtual_oracle.shapes(build)
    (row,) = jpeft.summary(model).rows
    head = 2_307 if task == "SEQ_CLS" else 0
    assert row.trainable == trained == sum(np.prod(v.shape) for v in jpeft.partition(model)[1].values())
    assert row.changed == head


WRONG = [
    ({"num_tokens": 0}, "PromptTuning's num_tokens must be a whole number of at least 1, got 0"),
    ({"init": "words"}, "PromptTuning's init must be one of random, uniform, .*; got 'words'"),
    ({"init": "text"}, "PromptTuning's init='text' needs token_ids="),
    ({"token_ids": [1]}, "PromptTuning's init='random' takes no token_ids="),
    ({"init": "text", "token_ids": [[1, 2]]}, r"token_ids must be a whole number of at least 0, got \(1, 2\)"),
    ({"init": "text", "token_ids": [-1]}, "token_ids must be a whole number of at least 0, got -1"),
    ({"init": "class_labels", "token_ids": [[]]}, r"token_ids must be a whole number of at least 0, got \(\)"),
    (
        {"init": "class_labels", "token_ids": [1, 2, 3], "num_tokens": 2},
        "3 class labels need as many tokens",
    ),
    ({"blocks": "mlp"}, "PromptTuning's blocks must be one of encoder, decoder; got 'mlp'"),
    ({"blocks": []}, r"PromptTuning's blocks must be one of encoder, decoder; got \[\]"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=lambda value: str(value)[:40])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.PromptTuning(**options)


def test_wrong_models_are_refused():
    base = jpeft.models.build(LLAMA, "CAUSAL_LM", key=KEY)
    with pytest.raises(ValueError, match="token_ids holds 11, and the model's word table has 11 rows"):
        adapted(base, init="text", token_ids=[11])
    with pytest.raises(ValueError, match=r"of a block encoder, and the model has none \(only of decoder\)"):
        adapted(base, blocks="encoder")
    with pytest.raises(ValueError, match=r"between embedding and layers .* and the model has none; the models of"):
        adapted(subjects.Stacked(4, 2, nnx.Rngs(0)))
    bert = jpeft.models.build(BERT | {"max_position_embeddings": 11}, "TOKEN_CLS", key=KEY)
    with pytest.raises(ValueError, match=r"are one of embeddings/pos.*vocab_size=11 does not tell which; start with"):
        adapted(bert, init="vocabulary")
