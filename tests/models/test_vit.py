# SPDX-License-Identifier: Apache-2.0
"""ViT's own: places between places, a pooler that may be absent, names of two ages, methods, losses, and its errors."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import peft_oracle as oracle
import pytest
import subjects
import torch
import transformers
from llama_reference import assert_close, flat
from safetensors.torch import save_file
from sense_subjects import VIT
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from virtual_oracle import run
from zoo_reference import batch, build, outputs_of, torch_model

import jpeft
from jpeft import models
from jpeft.models import CheckpointError, vit
from jpeft.models._bicubic import resized
from jpeft.train.losses import cls_loss, cls_sums
from jpeft.train.step import begin, make_step

KEY = jax.random.key(0)
CLS = "IMAGE_CLS"
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["projection", "q_proj", "fc1"], "modules_to_save": ["classifier"]}
#: PEFT's limits are those of its page: float32 against float32 at unit scale.
CLOSE = 1e-5


def test_parameters_of_the_presets():
    """With the thousand classes that the papers' models have."""
    counts = {
        name: models.num_parameters(dataclasses.replace(config, num_labels=1000), CLS)
        for name, config in vit.PRESETS.items()
    }
    assert counts == {
        "vit-base-patch16-224": 86_567_656,
        "vit-base-patch16-384": 86_859_496,
        "vit-base-patch32-384": 88_297_192,
        "vit-large-patch16-224": 304_326_632,
        "vit-large-patch32-384": 306_632_680,
        "vit-huge-patch14-224-in21k": 632_045_800,
    }


# Against transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 8), (6, 13), (12, 12)])
def test_images_of_other_sizes_are_transformers(size, tmp_path):
    theirs = torch_model(VIT.config, CLS, VIT.classes)
    theirs.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).standard_normal((2, 2, *size), np.float32)
    expected = theirs(torch.tensor(pixels), interpolate_pos_encoding=True).logits.detach().numpy()
    assert_close(models.load(tmp_path)(pixels, interpolate_pos_encoding=True), expected)


@pytest.mark.parametrize("old, new", [((3, 5), (7, 4)), ((1, 4), (3, 9)), ((6, 6), (2, 5))])
def test_a_grid_is_resized_as_in_torch(old, new):
    grid = np.random.default_rng(0).standard_normal((*old, 4)).astype(np.float32)
    given = torch.tensor(grid).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(given, size=new, mode="bicubic", align_corners=False)
    assert_close(resized(jnp.asarray(grid), new), expected[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("variant", ["base", "pooler"])
def test_the_pooler_is_transformers(variant, tmp_path):
    subject = VIT.changed(VIT.variants[variant])
    theirs = torch_model(subject.config, "FEATURE_EXTRACTION", subject.classes)
    theirs.save_pretrained(tmp_path)
    ours, inputs = models.load(tmp_path), batch(subject)
    expected = theirs(**{name: torch.tensor(value) for name, value in inputs.items()}).pooler_output
    assert_close(ours.pooled(ours.hidden(**inputs)), expected.detach().numpy())


def test_a_checkpoint_may_lack_the_pooler(tmp_path, caplog):
    config = transformers.ViTConfig(**VIT.config)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "jpeft"):
        ours = models.load(tmp_path)
    assert "initialised anew, to be trained: pooler/dense/bias, pooler/dense/kernel" in caplog.text
    pixels = batch(VIT)["pixel_values"]
    theirs = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert_close(ours(pixels), theirs(torch.tensor(pixels)).last_hidden_state.detach().numpy())


def test_files_with_transformers_own_names_are_read(tmp_path):
    """And written as transformers writes them, with the names of before its version 5."""
    theirs = torch_model(VIT.config, CLS, VIT.classes)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.config.save_pretrained(tmp_path / "new")
    assert any("layers.0.attention.q_proj" in name for name in theirs.state_dict())
    save_file({name: t.contiguous() for name, t in theirs.state_dict().items()}, tmp_path / "new" / "model.safetensors")
    ours = models.load(tmp_path / "new", CLS)
    jax.tree.map(np.testing.assert_array_equal, flat(ours), flat(models.load(tmp_path / "theirs")))
    models.save(ours, tmp_path / "ours")
    names = [
        {*jpeft.models._safetensors.header(tmp_path / folder / "model.safetensors")} for folder in ("ours", "theirs")
    ]
    assert names[0] == names[1]
    assert "vit.encoder.layer.1.output.dense.weight" in names[0]


def test_hidden_patches_are_not_seen():
    """Whatever stands in them, and in the patches that are left over at the edges."""
    subject = VIT.changed({"image_size": [13, 14]})
    model, inputs = build(subject.config, CLS), batch(subject)
    grid = inputs["attention_mask"][:, 1:].reshape(3, 3, 3)
    shown = np.zeros((3, 1, 13, 14), bool)
    shown[:, 0, :12, :12] = np.kron(grid, np.ones((1, 4, 4))).astype(bool)
    changed = {**inputs, "pixel_values": np.where(shown, inputs["pixel_values"], 5)}
    np.testing.assert_array_equal(outputs_of(model, **inputs), outputs_of(model, **changed))


# Methods --------------------------------------------------------------------------------------------------------------

METHODS = {
    "pfeiffer": jpeft.Pfeiffer(reduction_factor=4),
    "lora": jpeft.LoRA(rank=2, targets=["q_proj", "v_proj"], gate=True),
    **{
        kind: pytest.param(method, marks=pytest.mark.slow)
        for kind, method in {
            "dora": jpeft.DoRA(rank=2, targets=["projection", "fc2"]),
            "loha": jpeft.LoHa(rank=2, targets=["projection", "fc2"]),
            "vera": jpeft.VeRA(rank=2, targets=["q_proj", "v_proj"]),
            "loreft": jpeft.LoReFT(rank=2),
            "prefix_tuning": jpeft.PrefixTuning(num_tokens=3),
            "bitfit": jpeft.BitFit(),
            "ia3": jpeft.IA3(targets=["k_proj", "fc2"], feedforward=["fc2"]),
            "norm_tuning": jpeft.NormTuning(),
            "houlsby": jpeft.Houlsby(reduction_factor=4),
            "parallel_adapter": jpeft.ParallelAdapter(reduction_factor=4),
            "compacter": jpeft.Compacter(reduction_factor=4, n=2),
            "p_tuning": jpeft.PTuning(num_tokens=3),
            "prompt_tuning": jpeft.PromptTuning(num_tokens=3),
            "direft": jpeft.DiReFT(rank=2),
            "full": jpeft.FullFineTune(),
            "last_layers": jpeft.LastLayers(1),
        }.items()
    },
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_leaf_of_a_method_counts_and_strip_gives_the_base(method):
    model, inputs = build(VIT.config, CLS), batch(VIT)
    adapted = subjects.fill(jpeft.adapt(model, method, key=KEY))
    graphdef, trainable, frozen = jpeft.partition(adapted)
    weights = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    inputs["labels"] = np.array([0, 1, 0])

    @jax.jit
    def gradients(trainable, frozen):
        return jax.grad(lambda t: cls_loss(jpeft.combine(graphdef, t, frozen), inputs))(trainable)

    base, found = outputs_of(model, **batch(VIT)), gradients(trainable, frozen)
    assert np.abs((run(adapted, **batch(VIT)) - base) * weights).max() > 1e-3
    assert not [path for path, leaf in found.items() if not np.abs(leaf).max() > 0]
    np.testing.assert_array_equal(outputs_of(jpeft.strip(adapted), **batch(VIT)), base)


def test_a_prompt_stands_among_the_patches_and_has_no_place(tmp_path):
    """Visual prompt tuning (https://arxiv.org/abs/2203.12119); the head reads the class token as before."""
    theirs = torch_model(VIT.config, CLS, VIT.classes)
    theirs.save_pretrained(tmp_path)
    adapted = jpeft.adapt(models.load(tmp_path), jpeft.PromptTuning(num_tokens=3), key=KEY)
    prompt = next(
        torch.tensor(np.array(leaf)) for leaf in jpeft.partition(adapted)[1].values() if leaf.shape == (3, 24)
    )
    theirs.vit.embeddings.register_forward_hook(
        lambda module, given, e: torch.cat([e[:, :1], prompt.expand(len(e), -1, -1), e[:, 1:]], 1)
    )
    pixels = batch(VIT)["pixel_values"]
    assert_close(run(adapted, pixel_values=pixels), theirs(torch.tensor(pixels)).logits.detach().numpy())


def test_a_prefix_is_seen_in_every_layer(tmp_path):
    theirs = torch_model(VIT.config, CLS, VIT.classes)
    theirs.save_pretrained(tmp_path)
    adapted = subjects.fill(
        jpeft.adapt(models.load(tmp_path), jpeft.PrefixTuning(num_tokens=3, modules_to_save=()), key=KEY)
    )
    prefix = next(np.array(leaf) for leaf in jpeft.partition(adapted)[1].values() if leaf.ndim == 4)
    prefix = torch.tensor(prefix).reshape(3, 2, 2, 3, 8)  # tokens, layers, keys and values, heads, d_head
    layers = [layer.attention for layer in theirs.vit.layers]

    def attend(module, q, k, v, mask, scaling, **options):
        own = prefix[:, layers.index(module)].permute(1, 2, 0, 3)[:, None].expand(-1, len(q), -1, -1, -1)
        k, v = torch.cat([own[0], k], 2), torch.cat([own[1], v], 2)
        return ((q @ k.mT * scaling).softmax(-1) @ v).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("prefixed", attend)
    theirs.config._attn_implementation = "prefixed"
    pixels = batch(VIT)["pixel_values"]
    assert_close(run(adapted, pixel_values=pixels), theirs(torch.tensor(pixels)).logits.detach().numpy())


# PEFT -----------------------------------------------------------------------------------------------------------------


def test_lora_on_the_patches_goes_to_peft_and_back(tmp_path):
    method = jpeft.LoRA(rank=3, alpha=6, targets=["projection", "v_proj"], rank_pattern={"projection": 2})
    model = subjects.fill(jpeft.adapt(oracle.jax_model("vit"), method, key=KEY))
    jpeft.export_peft(model, tmp_path / "ours", base=str(oracle.folder("vit")))
    real, result = oracle.load_real("vit", tmp_path / "ours")
    assert result.unexpected_keys == []
    np.testing.assert_allclose(oracle.real_outputs(real, "vit"), run(model, **oracle.inputs_of(model)), atol=CLOSE)
    with oracle.quiet():
        found = peft.AutoPeftModel.from_pretrained(str(tmp_path / "ours")).eval()  # by the class that the file names
    np.testing.assert_array_equal(oracle.real_outputs(found, "vit"), oracle.real_outputs(real, "vit"))
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == (None, ["classifier"])
    card = (tmp_path / "ours" / "README.md").read_text()
    assert 'pipeline_tag: "image-classification"' in card
    assert "transformers.AutoModelForImageClassification.from_pretrained(" in card
    again = jpeft.import_peft(oracle.jax_model("vit"), tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, jpeft.partition(again)[1], jpeft.partition(model)[1])


def test_a_step_of_training_is_that_of_peft(tmp_path):
    """From an adapter that peft trained, on images and labels, in two halves."""
    real = oracle.train_real("vit", LORA, tmp_path / "start")
    model = jpeft.import_peft(oracle.jax_model("vit"), tmp_path / "start")
    rng = np.random.default_rng(5)
    pixels, labels = rng.standard_normal((4, 2, 8, 8)).astype(np.float32), rng.integers(0, 3, 4)
    loss = real(pixel_values=torch.tensor(pixels), labels=torch.tensor(labels)).loss
    assert_close(cls_loss(model, {"pixel_values": pixels, "labels": labels}), loss.item())
    weights = [weight for weight in real.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, 0.5)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    real.save_pretrained(str(tmp_path / "theirs"))

    graphdef, trainable, frozen = jpeft.partition(model)
    tx = optax.sgd(0.5)
    halves = {"pixel_values": pixels.reshape(2, 2, 2, 8, 8), "labels": labels.reshape(2, 2)}
    state, metrics = make_step(graphdef, cls_sums, tx)(begin(tx, trainable), frozen, halves, None)
    assert_close(metrics.loss, loss.item())
    jpeft.export_peft(jpeft.combine(graphdef, state.trainable, frozen), tmp_path / "ours")
    ours, theirs = (oracle.tensors(tmp_path / folder) for folder in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, atol=CLOSE, err_msg=name)


def test_a_file_without_a_head_trains_none(tmp_path):
    oracle.train_real("vit", {**LORA, "modules_to_save": None}, tmp_path)
    trainable = jpeft.partition(jpeft.import_peft(oracle.jax_model("vit"), tmp_path))[1]
    assert not [path for path in trainable if "classifier" in path]


def test_what_peft_has_no_form_for_is_refused(tmp_path):
    for method in (jpeft.PromptTuning(num_tokens=2), jpeft.PrefixTuning(num_tokens=2, shift_positions=True)):
        model = jpeft.adapt(oracle.jax_model("vit"), method, key=KEY)
        with pytest.raises(ValueError, match="called with tokens, and a vit model is not"):
            jpeft.export_peft(model, tmp_path)
    model = jpeft.adapt(oracle.jax_model("vit"), jpeft.DoRA(targets=["projection"]), key=KEY)
    with pytest.raises(ValueError, match=r"projection is a convolution; jpeft writes PEFT's DoRA of matrices"):
        jpeft.export_peft(model, tmp_path)


# Elsewhere, and errors ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_runs_on_a_mesh_and_in_a_bank():
    model, inputs = build(VIT.config, CLS), batch(VIT)
    pixels = np.concatenate([inputs["pixel_values"], inputs["pixel_values"][:1]])
    adapters = [
        subjects.fill(jpeft.adapt(model, jpeft.LoRA(rank=2, targets=["q_proj", "projection"]), key=KEY), seed)
        for seed in (1, 2)
    ]
    expected = np.stack([run(adapters[i % 2], pixel_values=pixels)[i] for i in range(4)])
    bank = jpeft.bank(adapters)
    assert_close(jpeft.apply_bank(bank, jnp.array([1, 2, 1, 2]), lambda model, x: model(x), pixels), expected)
    mesh = jpeft.mesh("data=2,fsdp=2,tensor=2")
    placed = jpeft.shard(adapters[0], mesh)
    kernel = placed.embeddings.patch_embeddings.projection.kernel[...]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, None, None, "fsdp")
    assert_close(run(placed, pixel_values=pixels), run(adapters[0], pixel_values=pixels))


def test_eva_reads_images():
    model, inputs = build(VIT.config, CLS), batch(VIT)
    adapted = jpeft.eva(model, jpeft.LoRA(rank=2, targets=["q_proj"]), [inputs], key=KEY)
    assert_close(run(adapted, **inputs), outputs_of(model, **inputs))
    assert [path for path in jpeft.partition(adapted)[1] if path.endswith("q_proj/adapters/lora/A")]


def test_a_batch_must_hold_one_thing_to_read():
    model = build(VIT.config, CLS)
    with pytest.raises(ValueError, match=r"one of input_ids, pixel_values, input_features, .* got images, labels"):
        cls_loss(model, {"images": batch(VIT)["pixel_values"], "labels": np.array([0, 1, 0])})


CALLS = {
    "size": (np.zeros((1, 2, 12, 16)), {}, r"places for images of \(2, 12, 12\), and got \(2, 12, 16\)"),
    "channels": (np.zeros((1, 3, 12, 12)), {}, r"with 2 channels; got \(1, 3, 12, 12\)"),
    "axes": pytest.param(
        np.zeros((2, 12, 12)), {}, r"\[batch, channels, height, width\] .* got \(2, 12, 12\)", marks=pytest.mark.untyped
    ),
    "small": (np.zeros((1, 2, 3, 12)), {"interpolate_pos_encoding": True}, r"\(3, 12\) holds no patch of \(4, 4\)"),
    "mask": (np.zeros((1, 2, 12, 12)), {"attention_mask": np.ones((1, 9))}, r"class token .* \(1, 10\); got \(1, 9\)"),
}


@pytest.mark.parametrize("pixels, options, message", CALLS.values(), ids=CALLS)
def test_calls_that_are_refused(pixels, options, message):
    with pytest.raises(ValueError, match=message):
        build(VIT.config, CLS)(pixels, **options)


CONFIGS = {
    "heads": ({"num_attention_heads": 5}, "multiple of num_attention_heads, got 24 and 5"),
    "activation": ({"pooler_act": "sine"}, "pooler_act must be one of .* got 'sine'"),
    "pair": ({"image_size": [3, 4, 5]}, r"height and width; got \(3, 4, 5\)"),
    "patch": ({"patch_size": 13}, r"an image of \(12, 12\) holds no patch of \(13, 13\)"),
    "unknown": ({"use_mean_pooling": True}, "use_mean_pooling"),
}


@pytest.mark.parametrize("changes, message", CONFIGS.values(), ids=CONFIGS)
def test_configs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build({**VIT.config, **changes}, CLS, key=KEY)


def test_other_errors(tmp_path):
    model = build(VIT.config, CLS)
    with pytest.raises(ValueError, match="IMAGE_CLS of a vit model has no pooler; it has one for FEATURE_EXTRACTION"):
        model.pooled(jnp.zeros((1, 10, 24)))
    with pytest.raises(ValueError, match="no default targets for model type 'vit'"):
        jpeft.adapt(model, jpeft.LoRA(), key=KEY)
    with pytest.raises(ValueError, match="knows no table of model type 'vit'"):
        jpeft.adapt(model, jpeft.TrainableTokens([1]), key=KEY)
    models.save(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_hf(), "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing keys: .*vit\.layers\.2\.attention\.k_proj\.bias"):
        models.load(tmp_path, CLS)
