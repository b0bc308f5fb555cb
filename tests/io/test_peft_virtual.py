# SPDX-License-Identifier: Apache-2.0
"""Prompts, prefixes and trained tokens in PEFT's format both ways, held against the real peft."""

import json

import jax
import numpy as np
import peft
import peft_oracle as oracle
import pytest
import subjects
from peft_oracle import config_of, real_outputs, tensors
from safetensors.numpy import save_file
from virtual_oracle import run

import jpeft
from jpeft.models import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

#: float32 against float32 at unit scale, through three layers.
ATOL = 1e-5
KEY = jax.random.key(0)
TOKENS = tuple(dict.fromkeys((7, int(oracle.IDS[2, 1]), 3, int(oracle.IDS[0, 0]))))


def prefix(**options):
    return jpeft.PrefixTuning(num_tokens=3, shift_positions=True, **options)


def tokens(**options):
    return jpeft.TrainableTokens(TOKENS, modules_to_save=(), **options)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


#: jpeft -> peft: (family, method).
EXPORTS = {
    "prompt, bert": ("bert cls", jpeft.PromptTuning(num_tokens=3)),
    "prompt, frozen head": slow("bert cls", jpeft.PromptTuning(num_tokens=3, modules_to_save=())),
    "prompt, saved": ("bert tokens", jpeft.PromptTuning(num_tokens=3, modules_to_save=["classifier", "LayerNorm"])),
    "prompt, answers": slow("bert answers", jpeft.PromptTuning(num_tokens=3)),
    "prompt, distilbert": ("distilbert", jpeft.PromptTuning(num_tokens=3, init="vocabulary")),
    "prompt, gpt2": ("gpt2", jpeft.PromptTuning(num_tokens=3)),
    "prompt, llama": slow("llama", jpeft.PromptTuning(num_tokens=3, blocks="decoder")),
    "prompt, t5": ("t5", jpeft.PromptTuning(num_tokens=3)),
    "p-tuning, bert": slow("bert cls", jpeft.PTuning(num_tokens=3, hidden_size=5)),
    "p-tuning, distilbert": slow("distilbert", jpeft.PTuning(num_tokens=3, hidden_size=5)),
    "p-tuning, gpt2": slow("gpt2", jpeft.PTuning(num_tokens=3, hidden_size=5)),
    "p-tuning, llama": ("llama tied", jpeft.PTuning(num_tokens=3, reparam="lstm", hidden_size=5)),
    "p-tuning, t5": slow("t5", jpeft.PTuning(num_tokens=3)),
    "prefix, bert": ("bert cls", prefix()),
    "prefix, bert tokens": slow("bert tokens", prefix()),
    "prefix, gpt2": ("gpt2", prefix()),
    "prefix, llama": ("llama", prefix(projection=True, hidden_size=5, modules_to_save=["lm_head"])),
    "prefix, qwen3": slow("qwen3", prefix(projection=True)),
    "tokens, bert": ("bert cls", tokens()),
    "tokens, distilbert": slow("distilbert", tokens()),
    "tokens, gpt2": slow("gpt2", tokens()),
    "tokens, llama": slow("llama", tokens()),
    "tokens, llama tied": ("llama tied", tokens()),
    "tokens, t5": ("t5", tokens()),
}
EXPORTS = [pytest.param(*getattr(case, "values", case), marks=getattr(case, "marks", ()), id=name)
           for name, case in EXPORTS.items()]  # fmt: skip

_THREE = {"num_virtual_tokens": 3}
#: peft -> jpeft: (family, configuration).
IMPORTS = [
    pytest.param("bert cls", peft.PromptTuningConfig(**_THREE), id="prompt, bert"),
    pytest.param("gpt2", peft.PromptTuningConfig(**_THREE), id="prompt, gpt2", marks=pytest.mark.slow),
    pytest.param("distilbert", peft.PromptTuningConfig(**_THREE, token_dim=16, num_attention_heads=4, num_layers=3),
                 id="prompt, distilbert"),
    pytest.param("t5", peft.PromptTuningConfig(**_THREE), id="prompt, t5"),
    pytest.param("bert tokens", peft.PromptEncoderConfig(**_THREE, encoder_hidden_size=5), id="p-tuning, bert"),
    pytest.param("llama", peft.PromptEncoderConfig(**_THREE, encoder_reparameterization_type="LSTM"),
                 id="p-tuning, llama", marks=pytest.mark.slow),
    pytest.param("t5", peft.PromptEncoderConfig(**_THREE), id="p-tuning, t5", marks=pytest.mark.slow),
    pytest.param("bert cls", peft.PrefixTuningConfig(**_THREE), id="prefix, bert", marks=pytest.mark.slow),
    pytest.param("gpt2", peft.PrefixTuningConfig(**_THREE, prefix_projection=True), id="prefix, gpt2"),
    pytest.param("llama", peft.PrefixTuningConfig(**_THREE), id="prefix, llama"),
    pytest.param("qwen3", peft.PrefixTuningConfig(**_THREE), id="prefix, qwen3", marks=pytest.mark.slow),
    pytest.param("bert cls", peft.TrainableTokensConfig(token_indices=[*TOKENS]), id="tokens, bert"),
    pytest.param("distilbert", peft.TrainableTokensConfig(token_indices=[*TOKENS]), id="tokens, distilbert",
                 marks=pytest.mark.slow),
    pytest.param("gpt2", peft.TrainableTokensConfig(token_indices=[*TOKENS], target_modules=["wte"]),
                 id="tokens, gpt2"),
    pytest.param("t5", peft.TrainableTokensConfig(token_indices=[*TOKENS]), id="tokens, t5"),
    pytest.param("llama", peft.TrainableTokensConfig(token_indices=[*TOKENS], target_modules=".*embed_tokens"),
                 id="tokens, llama", marks=pytest.mark.slow),
]  # fmt: skip


def adapted(family, method):
    return subjects.fill(jpeft.adapt(oracle.jax_model(family), method, key=KEY))


def outputs(model):
    return oracle.seen(run(model, **oracle.inputs_of(model)))


@pytest.mark.parametrize("family, method", EXPORTS)
def test_real_peft_computes_the_same_from_our_files(family, method, tmp_path):
    model = adapted(family, method)
    jpeft.export_peft(model, tmp_path / "adapter")
    real, loaded = oracle.load_real(family, tmp_path / "adapter")
    assert [key for key in loaded.unexpected_keys if key != "prompt_embeddings"] == []  # which peft loads by itself
    assert loaded.missing_keys == []
    logits = real_outputs(real, family)
    np.testing.assert_allclose(outputs(model), logits, atol=ATOL, rtol=0)
    assert np.abs(logits - real_outputs(oracle.torch_model(family), family)).max() > 0.05, "the adapter must count"

    back = jpeft.import_peft(oracle.jax_model(family), tmp_path / "adapter")
    jpeft.export_peft(back, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("family, config", IMPORTS)
def test_we_compute_the_same_from_real_peft_files(family, config, tmp_path):
    real = oracle.train_real(family, config, tmp_path / "real")
    model = jpeft.import_peft(oracle.jax_model(family), tmp_path / "real")
    logits = real_outputs(real, family)
    np.testing.assert_allclose(outputs(model), logits, atol=ATOL, rtol=0)
    assert np.abs(logits - real_outputs(oracle.torch_model(family), family)).max() > 0.01, "the adapter must count"

    jpeft.export_peft(model, tmp_path / "ours")
    theirs, ours = tensors(tmp_path / "real"), tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for key, tensor in ours.items():  # of T5's two prompts PEFT reads the first
        np.testing.assert_array_equal(tensor, theirs[key][: len(tensor)], err_msg=key)
        assert len(theirs[key]) == len(tensor) * (2 if family == "t5" and key == "prompt_embeddings" else 1)


@pytest.mark.parametrize(
    "family, method, theirs",
    [
        ("t5", jpeft.PTuning(num_tokens=3), peft.PromptTuningConfig(**_THREE, num_transformer_submodules=1)),
        ("bert cls", jpeft.PromptTuning(num_tokens=3), peft.PromptTuningConfig(**_THREE)),
        ("llama", prefix(projection=True), peft.PrefixTuningConfig(**_THREE)),
        ("llama tied", tokens(), peft.TrainableTokensConfig(token_indices=[*TOKENS])),
    ],
    ids=lambda value: value.kind if isinstance(value, jpeft.Method) else None,
)
def test_the_configuration_is_as_peft_s(family, method, theirs, tmp_path):
    jpeft.export_peft(jpeft.adapt(oracle.jax_model(family), method, key=KEY), tmp_path / "ours")
    oracle.train_real(family, theirs, tmp_path / "real")
    ours, expected = config_of(tmp_path / "ours"), config_of(tmp_path / "real")
    expected |= {"base_model_name_or_path": None}
    if family == "bert cls":
        expected |= {"modules_to_save": sorted({*expected["modules_to_save"]})}  # peft repeats what it adds on its own
    assert ours == expected


# Refusals -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "two prompts": ("t5", jpeft.PromptTuning(blocks=["encoder", "decoder"]),
                    "stands in front of the input of the encoder and the decoder, and PEFT reads one .* the encoder's"),
    "the decoder's prompt": ("t5", jpeft.PTuning(blocks="decoder"), "of the encoder's alone; adapt with blocks='enc"),
    "a table behind a prompt": ("bert tokens", jpeft.PromptTuning(modules_to_save=["word_embeddings"]),
                                r"modules_to_save has embeddings/word_embeddings, and behind a prompt PEFT reads"),
    "positions": ("llama", jpeft.PrefixTuning(), "PEFT counts a prefix as past tokens, .* with shift_positions=True"),
    "a gate": ("bert cls", prefix(gate=True), "PEFT's files hold no gates, and without them a gated prefix"),
    "some layers": ("llama", prefix(layers=[1]), "into the attention of every layer; adapt without layers="),
    "distilbert's prefix": ("distilbert", prefix(), "this model's prefixes: transformers' DistilBERT takes"),
    "deberta's prefix": ("deberta", prefix(), "this model's prefixes: transformers' DeBERTa takes no keys and values"),
    "t5's prefix": ("t5", prefix(), "in T5's decoder alone, where a query adds to each the bias of a past token's"),
    "a window's prefix": ("mistral", prefix(), "off which the attention's window slides.* take sliding_window out of"),
    "a head beside tokens": ("bert cls", jpeft.TrainableTokens(TOKENS),
                             "trains classifier whole, and PEFT's TRAINABLE_TOKENS saves no module .*modules_to_save="),
}  # fmt: skip


@pytest.mark.parametrize("family, method, message", REFUSED.values(), ids=REFUSED)
def test_what_peft_has_no_form_for_is_not_written(family, method, message, tmp_path):
    model = jpeft.adapt(oracle.jax_model(family), method, key=KEY)
    with pytest.raises(ValueError, match=message):
        jpeft.export_peft(model, tmp_path / "adapter")
    assert [*tmp_path.iterdir()] == []


def changed(folder, tensors=None, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


MISREAD = {
    "no length": (prefix(), {"num_virtual_tokens": None}, ValueError, "num_virtual_tokens is None, and must be a"),
    "another length": (prefix(), {"num_virtual_tokens": 4}, CheckpointError,
                       r"prompt_embeddings is \[3, 48\], the model needs \[4, 48\]"),
    "other layers": (prefix(), {"num_layers": 2}, ValueError, "num_layers is 2, and this model's keys .* of 3"),
    "other heads": (prefix(), {"num_attention_heads": 4}, ValueError, "num_attention_heads is 4, .* those of 2"),
    "an unknown key": (prefix(), {"num_frozen_tokens": 1}, ValueError, "virtual tokens does not .*num_frozen_tokens=1"),
    "a word table": (jpeft.PromptTuning(num_tokens=3), {"modules_to_save": ["embed_tokens"]}, ValueError,
                     "modules_to_save has embed_tokens, and behind a prompt PEFT reads the base's own"),
    "no module": (jpeft.PromptTuning(num_tokens=3), {"modules_to_save": ["scores"]}, ValueError,
                  "modules_to_save names 'scores', which this model does not have"),
    "no table": (tokens(), {"target_modules": ["q_proj"]}, ValueError, r"target_modules=\['q_proj'\] is no embedding"),
    "no tokens": (tokens(), {"token_indices": []}, ValueError, "one row for each token that is named, once; got none"),
    "an option of tokens": (tokens(), {"layers": [1]}, ValueError, r"TrainableTokens does not do, .*: layers=\[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("method, changes, error, message", MISREAD.values(), ids=MISREAD)
def test_what_is_no_adapter_of_ours_is_not_read(method, changes, error, message, tmp_path):
    jpeft.export_peft(jpeft.adapt(oracle.jax_model("llama"), method, key=KEY), tmp_path)
    with pytest.raises(error, match=message):
        jpeft.import_peft(oracle.jax_model("llama"), changed(tmp_path, **changes))


def test_a_prompt_that_is_missing_or_beside_others_is_named(tmp_path):
    model = jpeft.adapt(oracle.jax_model("llama"), jpeft.PromptTuning(num_tokens=3), key=KEY)
    jpeft.export_peft(model, tmp_path)
    prompt = tensors(tmp_path)["prompt_embeddings"]
    for given in ({"base_model.prompt_embeddings": prompt}, {"prompt": prompt}):
        with pytest.raises(CheckpointError, match=rf"prompt_embeddings is missing\n  {next(iter(given))} is unknown"):
            jpeft.import_peft(oracle.jax_model("llama"), changed(tmp_path, given))
    prompt[1, 2] = np.nan
    with pytest.raises(CheckpointError, match="prompt_embeddings has values that are not finite"):
        jpeft.import_peft(oracle.jax_model("llama"), changed(tmp_path, {"prompt_embeddings": prompt}))


def test_rows_of_a_tied_table_that_differ_are_refused(tmp_path):
    jpeft.export_peft(jpeft.adapt(oracle.jax_model("llama tied"), tokens(), key=KEY), tmp_path)
    rows = tensors(tmp_path)
    assert [*rows] == [f"base_model.model.{name}.trainable_tokens_delta" for name in ("lm_head", "model.embed_tokens")]
    rows["base_model.model.lm_head.trainable_tokens_delta"] += 1
    with pytest.raises(CheckpointError, match="trainable_tokens_delta differs from the tensor that it is tied to"):
        jpeft.import_peft(oracle.jax_model("llama tied"), changed(tmp_path, rows))


def test_training_goes_on_from_what_is_read(tmp_path):
    """An imported network is its outputs: a plain prompt, trained as one."""
    oracle.train_real("llama", peft.PromptEncoderConfig(**_THREE), tmp_path)
    model = jpeft.import_peft(oracle.jax_model("llama"), tmp_path)
    graphdef, trainable, frozen = jpeft.partition(model)
    assert {path: leaf.shape for path, leaf in trainable.items()} == {"adapters/p_tuning/prompt": (3, 16)}
    assert jpeft.summary(model).rows[0].method == jpeft.PromptTuning(num_tokens=3, modules_to_save=())

    def loss(trainable):
        return (jpeft.combine(graphdef, trainable, frozen)(oracle.IDS, oracle.MASK) ** 2).mean()

    (gradient,) = jax.jit(jax.grad(loss))(trainable).values()
    assert (gradient != 0).all()
