# SPDX-License-Identifier: Apache-2.0
"""PEFT's format both ways, held against the real peft: logits, gradients, and every tensor."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_oracle as oracle
import pytest
import torch
from llama_reference import assert_close
from peft_oracle import config_of, real_outputs, tensors
from safetensors.torch import load_file as torch_file
from safetensors.torch import save_file

import jpeft

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

#: float32 against float32 at unit scale, through three layers.
ATOL = 1e-5

_BERT = "bert cls"


def lora(*targets, **options):
    """LoRA with an alpha unlike its rank."""
    return jpeft.LoRA(rank=3, alpha=5, targets=targets or None, **options)


#: jpeft -> peft: (family, method). A later method joins with one line.
EXPORTS = {
    "defaults": (_BERT, jpeft.LoRA()),
    "all-linear": (_BERT, jpeft.LoRA(targets="all-linear", rslora=True, dropout=0.1)),
    "regex": (_BERT, jpeft.LoRA(alpha=3, targets=r".*\.attention\.(self\.key|output\.dense)")),
    "same last part": (_BERT, lora("attention.output.dense")),
    "one layer": (_BERT, lora("query", "value", layers=[1])),
    "ragged layers": (_BERT, jpeft.LoRA(alpha=3, targets=r".*(0.*query|1.*value|2.*(value|key))")),
    "exclude": (_BERT, lora("query", "key", exclude=["layer.0.attention.self.key"])),
    "ranks": (_BERT, lora("query", "key", rank_pattern={"query": 5, r"layer\.1.*key": 2})),
    "ranks in order": (_BERT, lora("query", rank_pattern={"self.query": 5, "(0|1).attention.self.query": 2})),
    "alphas": (_BERT, lora("query", "key", alpha_pattern={"query": 2.5, "key": 1}, rslora=True)),
    "bias of adapted": (_BERT, lora("query", "dense", layers=[0, 2], bias="lora_only")),
    "all biases": (_BERT, lora("key", bias="all")),
    "saved": (_BERT, lora("key", modules_to_save=["pooler", "classifier", "embeddings"])),
    "frozen head": (_BERT, lora("key", modules_to_save=())),
    "frozen head, biases": (_BERT, lora("key", modules_to_save=(), bias="all")),
    "orthogonal": (_BERT, jpeft.LoRA(rank=4, alpha=3, init="orthogonal")),
    "pissa": (_BERT, jpeft.LoRA(alpha=3, targets="all-linear", init="pissa")),
    "pissa, patterns": (_BERT, lora("query", "key", init="pissa", rank_pattern={"1.*key": 5},
                                    alpha_pattern={"query": 2})),
    "olora, rslora": (_BERT, lora(init="olora", rslora=True, layers=[0, 2])),
    "word embeddings": (_BERT, lora("word_embeddings", "token_type_embeddings", "value")),
    "tokens": ("bert tokens", lora("query", "intermediate.dense")),
    "answers": ("bert answers", lora()),
    "states": ("bert", lora(layers=[0, 1], modules_to_save=["pooler"])),
    "llama": ("llama", jpeft.LoRA(alpha=3, targets="all-linear", bias="lora_only")),
    "llama, layers": ("llama", lora("q_proj", "gate_proj", layers=[0, 2])),
    "llama, head": ("llama", lora("lm_head", "embed_tokens")),
    "llama, saved": ("llama", lora(modules_to_save=["lm_head", "model.norm", "embed_tokens"])),
    "llama tied": ("llama tied", lora("embed_tokens", "v_proj", rank_pattern={"embed_tokens": 2})),
    "llama tied, pissa": ("llama tied", lora("embed_tokens", init="pissa")),
    "llama tied, saved": ("llama tied", lora(modules_to_save=["embed_tokens"])),
    "llama cls": ("llama cls", jpeft.LoRA(alpha=3, targets="all-linear")),
    "llama states, layers": ("llama states", lora(layers=[1])),
    "mistral": ("mistral", lora("q_proj", "k_proj", rslora=True)),
    "qwen2": ("qwen2", lora("k_proj", "down_proj", bias="all")),
    "deberta": ("deberta", lora("query_proj", "dense", modules_to_save=["rel_embeddings", "conv"])),
    "distilbert": ("distilbert", lora()),
    "roberta": ("roberta cls", jpeft.LoRA(alpha=3, targets="all-linear")),
    "roberta, frozen head": ("roberta cls", lora("dense", modules_to_save=(), bias="lora_only", layers=[0, 2])),
    "roberta, tables": ("xlm-roberta tokens", lora("position_embeddings", "query", modules_to_save=["classifier"])),
    "t5": ("t5", lora("q", "wo")),
    "t5, layers": ("t5", lora("SelfAttention.k", "v", layers=[1])),
    "gpt2": ("gpt2", lora("c_attn", "c_proj", layers=[0, 2], bias="lora_only")),
    "gpt2 tied": ("gpt2", lora("wte", "wpe")),
    "qwen3": ("qwen3", lora(rank_pattern={"v_proj": 1}, modules_to_save=["q_norm"])),
    "gemma2": ("gemma2", jpeft.LoRA(alpha=3, targets="all-linear")),
    "gemma3, tied": ("gemma3", lora("embed_tokens", "v_proj", modules_to_save=["post_feedforward_layernorm"])),
    "phi3": ("phi3", lora("qkv_proj", "gate_up_proj", "o_proj", layers=[0, 2])),
    "dora": (_BERT, jpeft.DoRA(rank=3, alpha=5, targets=["query", "dense", "word_embeddings"])),
    "dora, ranks and biases": (_BERT, jpeft.DoRA(alpha=3, targets=["query", "key"], rank_pattern={"key": 2},
                                                 rslora=True, bias="lora_only", layers=[0, 2])),
    "dora, pissa": ("llama", jpeft.DoRA(rank=3, alpha=5, init="pissa")),
    "adalora": (_BERT, jpeft.AdaLoRA(init_rank=4, target_rank=2, alpha=9, targets=["query", "output.dense"],
                                     layers=[0, 2], tinit=2, tfinal=3, delta_t=2, total_steps=20)),
}  # fmt: skip


def config(*targets, **options):
    """A LoraConfig's arguments, with an alpha unlike the rank."""
    return {"r": 3, "lora_alpha": 5, "target_modules": [*targets] or None, **options}


#: peft -> jpeft: (family, LoraConfig's arguments).
IMPORTS = {
    "defaults": (_BERT, {}),
    "all-linear": (_BERT, {"target_modules": "all-linear", "lora_alpha": 3, "use_rslora": True}),
    "regex": (_BERT, {"target_modules": r".*attention\.(self\.key|output\.dense)", "lora_alpha": 3}),
    "exclude": (_BERT, config("query", "dense", exclude_modules=r".*layer\.1\..*|.*pooler.*")),
    "layers": (_BERT, config("key", layers_to_transform=[0, 2], layers_pattern="layer")),
    "one layer": ("llama", config("k_proj", "up_proj", layers_to_transform=1)),
    "needless entries": (_BERT, config("query", "q_proj", rank_pattern={"q_proj": 7})),
    "ranks": (_BERT, config("query", "key", rank_pattern={"query": 5, "^bert.*1.*key": 2})),
    "alphas": (_BERT, config("query", "key", alpha_pattern={"key": 9.5}, use_rslora=True)),
    "bias of adapted": (_BERT, config("query", "classifier", "pooler.dense", bias="lora_only")),
    "all biases": (_BERT, config("key", bias="all")),
    "saved": (_BERT, config("key", modules_to_save=["pooler", "LayerNorm"])),
    "gaussian": (_BERT, config(init_lora_weights="gaussian")),
    "orthogonal": (_BERT, {"r": 4, "lora_alpha": 3, "init_lora_weights": "orthogonal"}),
    "word embeddings": (_BERT, config("word_embeddings", "value")),
    "tokens": ("bert tokens", config("output.dense")),
    "answers": ("bert answers", config()),
    "states": ("bert", {"target_modules": "all-linear", "lora_alpha": 3}),
    "llama": ("llama", {"target_modules": "all-linear", "lora_alpha": 3, "bias": "all"}),
    "llama, embeddings": ("llama", config("embed_tokens", "lm_head")),
    "llama, saved": ("llama", config(modules_to_save=["lm_head", "embed_tokens"])),
    "llama tied": ("llama tied", config("embed_tokens", "v_proj", ensure_weight_tying=True)),
    "llama tied, head": ("llama tied", config("lm_head", "v_proj", ensure_weight_tying=True)),
    "llama tied, saved": ("llama tied", config(modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "llama cls": ("llama cls", {"target_modules": "all-linear", "lora_alpha": 3}),
    "llama states": ("llama states", config()),
    "mistral": ("mistral", config("o_proj")),
    "qwen2": ("qwen2", config("v_proj", bias="lora_only")),
    "t5": ("t5", {"target_modules": "all-linear", "lora_alpha": 3}),
    "t5, defaults": ("t5", {}),
    "gpt2": ("gpt2", {"target_modules": "all-linear", "lora_alpha": 3, "fan_in_fan_out": True}),
    "distilbert": ("distilbert", config("q_lin", "out_lin", "lin2", bias="lora_only")),
    "qwen3": ("qwen3", config(modules_to_save=["k_norm"])),
    "dora": (_BERT, config("query", "word_embeddings", use_dora=True)),
    "dora, llama": ("llama tied", config("q_proj", "down_proj", use_dora=True, use_rslora=True, bias="lora_only")),
}


def adapted(family, method, name=None):
    """A model with `method` on it, and every trainable leaf away from its start."""
    model = jpeft.adapt(oracle.jax_model(family), method, key=jax.random.key(0), name=name)
    graphdef, trainable, frozen = jpeft.partition(model)
    rng = np.random.default_rng(3)
    moved = {path: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in trainable.items()}
    return jpeft.combine(graphdef, moved, frozen)


def outputs(model):
    graphdef, trainable, frozen = jpeft.partition(model)
    run = jax.jit(lambda trainable, frozen: oracle.jax_outputs(jpeft.combine(graphdef, trainable, frozen)))
    return oracle.seen(np.array(run(trainable, frozen)))


@pytest.mark.parametrize("case", EXPORTS)
def test_real_peft_computes_the_same_from_our_files(case, tmp_path):
    family, method = EXPORTS[case]
    model = adapted(family, method)
    jpeft.export_peft(model, tmp_path / "adapter")
    real, loaded = oracle.load_real(family, tmp_path / "adapter")
    assert loaded.unexpected_keys == []
    assert loaded.missing_keys == []
    logits = real_outputs(real, family)
    assert_close(outputs(model), logits)
    assert np.abs(logits - real_outputs(oracle.torch_model(family), family)).max() > 0.1, "the adapter must count"

    back = jpeft.import_peft(oracle.jax_model(family), tmp_path / "adapter")
    jpeft.export_peft(back, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("case", IMPORTS)
def test_we_compute_the_same_from_real_peft_files(case, tmp_path):
    family, options = IMPORTS[case]
    real = oracle.train_real(family, options, tmp_path / "real")
    model = jpeft.import_peft(oracle.jax_model(family), tmp_path / "real")
    logits = real_outputs(real, family)
    np.testing.assert_allclose(outputs(model), logits, atol=ATOL, rtol=0)
    assert np.abs(logits - real_outputs(oracle.torch_model(family), family)).max() > 0.01, "the adapter must count"

    jpeft.export_peft(model, tmp_path / "ours")
    theirs, ours = tensors(tmp_path / "real"), tensors(tmp_path / "ours")
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[key], err_msg=key)
    copies = (".base_layer.weight", ".original_module.bias", ".modules_to_save.bias")  # which PEFT never reads
    assert [key for key in theirs.keys() - ours.keys() if not key.endswith(copies)] == []


@pytest.mark.parametrize(
    "case",
    ["defaults", "word embeddings", "all biases", "llama", "llama, embeddings", "qwen3", "distilbert", "gpt2", "t5"],
)
def test_gradients_are_those_of_real_peft(case, tmp_path):
    family, options = IMPORTS[case]
    real = oracle.train_real(family, options, tmp_path / "real")
    real.zero_grad()
    oracle.torch_loss(real, family).backward()
    graphdef, trainable, frozen = jpeft.partition(jpeft.import_peft(oracle.jax_model(family), tmp_path / "real"))

    @jax.jit
    @jax.grad
    def gradient(trainable, frozen):
        out = oracle.jax_outputs(jpeft.combine(graphdef, trainable, frozen))
        return (out * oracle.cotangent(out)).sum()

    # they have an adapter's shapes, so they can be written as one
    jpeft.export_peft(jpeft.combine(graphdef, gradient(trainable, frozen), frozen), tmp_path / "gradients")
    ours = tensors(tmp_path / "gradients")
    theirs = {
        name.replace(".default", "").replace(".modules_to_save", ""): weight.grad.numpy()
        for name, weight in real.named_parameters()
        if weight.grad is not None
    }
    assert ours.keys() == theirs.keys()
    for key, grad in ours.items():
        np.testing.assert_allclose(
            grad, theirs[key], atol=ATOL * max(1, np.abs(theirs[key]).max()), rtol=0, err_msg=key
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_tensors_become_float32(dtype, tmp_path):
    oracle.train_real(_BERT, config(), tmp_path)
    halves = {key: torch.tensor(tensor).to(dtype) for key, tensor in tensors(tmp_path).items()}
    save_file(halves, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    _, trainable, _ = jpeft.partition(jpeft.import_peft(oracle.jax_model(_BERT), tmp_path))
    assert {leaf.dtype.name for leaf in trainable.values()} == {"float32"}
    key = "base_model.model.bert.encoder.layer.2.attention.self.value.lora_A.weight"
    A = trainable["layers/attention/self/value/adapters/lora/A"]
    np.testing.assert_array_equal(A[2].T, halves[key].float().numpy())


def test_the_configuration_is_complete(tmp_path):
    method = lora("query", "key", dropout=0.05, rank_pattern={"key": 2}, bias="all", modules_to_save=["classifier"])
    jpeft.export_peft(adapted(_BERT, method), tmp_path, base="google-bert/bert-base-uncased")
    theirs = peft.LoraConfig(
        task_type="SEQ_CLS",
        base_model_name_or_path="google-bert/bert-base-uncased",
        inference_mode=True,
        r=3,
        lora_alpha=5,
        lora_dropout=0.05,
        rank_pattern={"key": 2},
        bias="all",
        modules_to_save=["classifier", "score"],  # as PEFT saves it
    ).to_dict()
    assert config_of(tmp_path) == {**theirs, "target_modules": ["key", "query"], "peft_version": "0.21.2"}
    text = (tmp_path / "adapter_config.json").read_text()
    assert text == json.dumps(config_of(tmp_path), indent=2, sort_keys=True) + "\n"


def test_the_tensors_are_named_and_laid_out_as_peft_s(tmp_path):
    model = adapted(_BERT, lora("query", rank_pattern={"1.attention.self.query": 2}))
    jpeft.export_peft(model, tmp_path)
    _, trainable, _ = jpeft.partition(model)
    A, B = (np.array(trainable[f"layers/attention/self/query/adapters/lora/{leaf}"]) for leaf in "AB")
    written, layer = tensors(tmp_path), "base_model.model.bert.encoder.layer.{}.attention.self.query.lora_{}.weight"
    assert {layer.format(i, leaf) for i in range(3) for leaf in "AB"} == {key for key in written if "lora" in key}
    for i, rank in enumerate((3, 2, 3)):
        np.testing.assert_array_equal(written[layer.format(i, "A")], A[i, :, :rank].T)
        np.testing.assert_array_equal(written[layer.format(i, "B")], B[i, :rank].T)
    assert {key: tensor.shape for key, tensor in written.items() if "lora" not in key} == {
        "base_model.model.classifier.weight": (3, 16),
        "base_model.model.classifier.bias": (3,),
    }
    assert {tensor.dtype.name for tensor in written.values()} == {"float32"}


def test_targets_are_said_as_briefly_as_they_can_be(tmp_path):
    said = {}
    for case in ("same last part", "one layer", "ragged layers", "all-linear", "llama states, layers"):
        family, method = EXPORTS[case]
        jpeft.export_peft(jpeft.adapt(oracle.jax_model(family), method, key=jax.random.key(0)), tmp_path / case)
        written = config_of(tmp_path / case)
        said[case] = written["target_modules"], written["layers_to_transform"]
    assert said == {
        "same last part": (["attention.output.dense"], None),
        "one layer": (["query", "value"], [1]),
        "ragged layers": (
            [
                "bert.encoder.layer.0.attention.self.query",
                "bert.encoder.layer.1.attention.self.value",
                "bert.encoder.layer.2.attention.self.key",
                "bert.encoder.layer.2.attention.self.value",
            ],
            None,
        ),
        "all-linear": (["dense", "key", "query", "value"], None),
        # PEFT finds no layer number in `layers.1`, only in `model.layers.1`
        "llama states, layers": (["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"], None),
    }


def test_an_imported_adapter_has_peft_s_settings(tmp_path):
    options = config("query", "key", lora_dropout=0.2, use_rslora=True, layers_to_transform=[1, 2])
    oracle.train_real(_BERT, options, tmp_path)
    model = jpeft.import_peft(oracle.jax_model(_BERT), tmp_path, name="mine")
    (row,) = jpeft.summary(model).rows
    assert row.name == "mine"
    assert row.method == lora("key", "query", dropout=0.2, rslora=True, layers=[1, 2], modules_to_save=["classifier"])


def test_import_leaves_the_base_alone_and_does_not_depend_on_the_key(tmp_path):
    base = oracle.jax_model(_BERT)
    before = {path: np.array(leaf) for path, leaf in jpeft.partition(base)[2].items()}
    jpeft.export_peft(adapted(_BERT, lora(rank_pattern={"1.attention.self.query": 2})), tmp_path)
    one = jpeft.partition(jpeft.import_peft(base, tmp_path))
    other = jpeft.partition(jpeft.import_peft(base, tmp_path, key=jax.random.key(7)))
    assert one[0] == other[0]
    for path, leaf in one[1].items():
        np.testing.assert_array_equal(leaf, other[1][path], err_msg=path)
    assert jpeft.partition(base)[1] == {}
    for path, leaf in one[2].items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)


def test_an_adapter_on_several_devices_is_written_whole(tmp_path):
    model = adapted("llama", lora("q_proj", "down_proj", init="pissa"))
    jpeft.export_peft(model, tmp_path / "one")
    graphdef, trainable, frozen = jpeft.partition(model)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split = {
        path: jax.sharding.NamedSharding(mesh, jax.P(None, "fsdp"))
        for path, a in trainable.items()
        if a.shape[1] % 4 == 0
    }
    assert split
    spread = {path: jax.device_put(leaf, split.get(path)) for path, leaf in trainable.items()}
    jpeft.export_peft(jpeft.combine(graphdef, spread, frozen), tmp_path / "four")
    for key, tensor in tensors(tmp_path / "one").items():
        np.testing.assert_array_equal(tensors(tmp_path / "four")[key], tensor)


def test_an_adapter_of_a_bfloat16_base(tmp_path):
    """PEFT's copy of the embedding is bfloat16 then, and equals ours to the bit; the adapter is float32 in both."""
    oracle.train_real("llama", config("embed_tokens", "q_proj"), tmp_path, torch.bfloat16)
    base = jpeft.models.load(oracle.folder("llama"), "CAUSAL_LM", dtype=jnp.bfloat16)
    _, trainable, _ = jpeft.partition(jpeft.import_peft(base, tmp_path))
    written = torch_file(tmp_path / "adapter_model.safetensors")
    assert written["base_model.model.model.embed_tokens.base_layer.weight"].dtype == torch.bfloat16
    for leaf, key in {"A": "lora_embedding_A", "B": "lora_embedding_B"}.items():
        ours = trainable[f"embed_tokens/adapters/lora/{leaf}"]
        np.testing.assert_array_equal(ours.T, written[f"base_model.model.model.embed_tokens.{key}"].numpy())


def test_a_pissa_adapter_that_peft_converted_is_read(tmp_path):
    options = config("q_proj", "down_proj", init_lora_weights="pissa")
    with oracle.quiet():
        settings = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(oracle.torch_model("llama"), settings)
        settings.init_lora_weights = True  # the start as PEFT's own guide says to save it
        model.save_pretrained(tmp_path / "start")
        for name, weight in model.named_parameters():
            weight.data += 0.1 if "lora_" in name else 0
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = outputs(jpeft.import_peft(oracle.jax_model("llama"), tmp_path / "plain"))
    np.testing.assert_allclose(ours, real_outputs(model.eval(), "llama"), atol=ATOL, rtol=0)
