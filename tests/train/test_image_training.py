# SPDX-License-Identifier: Apache-2.0
"""`jpeft train` of an image classifier: it learns, is opened again, and is what transformers and peft train."""

import json
import shutil

import jax
import numpy as np
import painted
import pytest
import torch
import transformers
import yaml
from peft import PeftModel, get_peft_model_state_dict
from safetensors.numpy import load_file
from transformers.image_utils import load_image

import jpeft
from jpeft.train import cli, config, folder, image_report, job, loop, own, saved

#: Float32 against float64, over 14 updates of Adam at a rate of 0.01; apart were 3e-6 and 6e-7.
LOSS, WEIGHT = 1e-5, 5e-6


def run(capsys, *arguments):
    """Standard output of a command that succeeds."""
    cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_counts_images_and_is_used_by_the_commands(see, pets, tmp_path, capsys):
    file, out = tmp_path / "see.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(see))
    said = run(capsys, "train", file)
    assert "train: 37 rows -> 37 images" in said
    assert "batches of 8 x 1 rows of 8 x 8 pixels, 5 tokens to the model" in said
    assert "10 updates, 5 an epoch; at most 1 compilation\n" in said
    logged = lines(out)
    steps, evaluations = ([line for line in logged if name in line] for name in ("losses", "eval_accuracy"))
    assert [line["update"] for line in evaluations] == [5, 10]
    assert evaluations[-1]["eval_accuracy"] > 0.9
    assert all(line["images_per_s"] > 0 and "tokens_per_s" not in line for line in steps)
    assert (out / "plots" / "throughput.png").stat().st_size > 0
    record = json.loads((out / "run.json").read_text())
    assert record["label_names"] == ["blue", "red"]
    assert {*record["data_sha256"]} == {str(pets / "train"), str(pets / "validation")}
    assert len((out / "images.sha256").read_text().splitlines()) == 37 + 14

    named = ["--adapter", out / "adapter"]
    told = run(capsys, "eval", *named, "--data", pets / "validation").splitlines()
    assert told[0] == "14 rows -> 14 images"
    figures = {name: float(value) for name, value in map(str.split, told[1:])}
    for name, value in figures.items():
        np.testing.assert_allclose(value, evaluations[-1][f"eval_{name}"], atol=2e-6)
    files = sorted((pets / "validation").glob("*/*.png"))
    told = [line.split("\t") for line in run(capsys, "predict", *named, *files).splitlines()]
    right = [label == file.parent.name for (label, *_), file in zip(told, files, strict=True)]
    np.testing.assert_allclose(np.mean(right), figures["accuracy"], atol=1e-6)
    assert json.loads((out / "adapter" / "jpeft.json").read_text())["max_length"] is None

    folder.remove_run(out)
    assert not out.exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_losses_and_weights_are_those_of_transformers_and_peft(vit, pets, see, tmp_path):
    """The same files in the same order, two micro-batches an update, the last of an epoch not full."""
    model = painted.write_vit(tmp_path / "vit", "IMAGE_CLS", hidden_dropout_prob=0.1)
    settings = config.parse(config.overridden(see, [
        f"model.path={model}", "train.batch_size=3", "train.accumulation=2", "train.dropout=false", "train.log_every=5",
        "optimizer.lr=0.01", "optimizer.schedule=linear", "optimizer.clip=null", "method.rank=3", "method.alpha=5",
        "data.eval=[]",
    ]))  # fmt: skip
    dataset = job.read_data(settings)
    parts = job.build(settings, dataset.label_names, None)
    start = jpeft.combine(parts.graphdef, parts.trainable, parts.frozen)
    jpeft.export_peft(start, tmp_path / "start", base=str(model))
    epochs = [dataset.train.buckets.epoch(0, epoch) for epoch in range(2)]
    files = [[dataset.train.examples.names[row] for row in batch.rows] for epoch in epochs for batch in epoch]
    assert sorted({*map(len, files)}) == [1, 6]

    result = loop.train(settings)
    theirs, losses = _torch(model, tmp_path / "start", files)
    assert losses[-1] < 0.7 * losses[0]
    np.testing.assert_allclose(result.losses, losses, rtol=LOSS, atol=LOSS)
    ours = load_file(result.adapter / "adapter_model.safetensors")
    assert {*ours} == {*theirs}
    moved = load_file(tmp_path / "start" / "adapter_model.safetensors")
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=WEIGHT, atol=WEIGHT, err_msg=name)
        assert np.abs(tensor - moved[name]).max() > 0.01, name


def _torch(model, start, batches):
    """(adapter, losses) of torch, float64, on these files, the rate falling linearly to 0."""
    base = transformers.ViTForImageClassification.from_pretrained(model)
    tuned = PeftModel.from_pretrained(base, start, is_trainable=True).double().eval()  # no dropout
    processor = transformers.ViTImageProcessor.from_pretrained(model)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    losses = []
    for at, files in enumerate(batches):
        pixels = processor([load_image(file) for file in files], return_tensors="pt")["pixel_values"].double()
        labels = torch.tensor([int(file.split("/")[-2] == "red") for file in files])
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - at / len(batches))
        loss = torch.nn.functional.cross_entropy(tuned(pixel_values=pixels).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {name: tensor.detach().numpy() for name, tensor in get_peft_model_state_dict(tuned).items()}, losses


#: A method of every kind, and options that it cannot do without on a ViT.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
METHODS = {
    "houlsby": {"reduction_factor": 4},
    "pfeiffer": {"reduction_factor": 4},
    "parallel_adapter": {},
    "compacter": {"reduction_factor": 4, "n": 2},
    "prompt_tuning": {"num_tokens": 3},
    "prefix_tuning": {"num_tokens": 3},
    "p_tuning": {"num_tokens": 3},
    "ia3": {"targets": ["k_proj", "v_proj", "fc2"], "feedforward": ["fc2"]},
    "bitfit": {},
    "norm_tuning": {},
    "full": {},
    "last_layers": {"n": 1},
    "loreft": {},
    "noreft": {},
    "direft": {},
    "adalora": {"targets": LINEARS, "total_steps": 2, "tinit": 0, "tfinal": 1},
    "oft": {"targets": LINEARS, "block_size": 4},
    "fourierft": {"targets": LINEARS, "n_frequency": 50},
    **{kind: {"targets": LINEARS} for kind in ("dora", "loha", "lokr", "vera")},
}
FAST = ("houlsby", "prompt_tuning")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in FAST else [pytest.mark.slow]) for k in METHODS])
def test_every_method_that_sees_trains_and_is_opened_again(kind, see, pets, capsys):
    see |= {"method": {"kind": kind, **METHODS[kind]}, "train": {"max_steps": 2, "batch_size": 8, "eval_every": 2}}
    settings = config.parse(see)
    before = job.build(settings, ("blue", "red"), None).trainable
    result = loop.train(settings)
    moved = [float(np.abs(np.asarray(result.state.trainable[path]) - leaf).max()) for path, leaf in before.items()]
    assert max(moved) > 0
    told = run(capsys, "eval", "--adapter", result.adapter, "--data", pets / "validation")
    assert result.evaluation is not None
    assert f"loss {result.evaluation.metrics['loss']:.4f}" in told


@pytest.mark.slow
def test_a_mesh_trains_as_one_device_does(see, tmp_path):
    plain = ["train.max_steps=4", "train.epochs=null", "train.dropout=false", "train.eval_every=4"]
    one, eight = (
        loop.train(config.parse(config.overridden(see, [*plain, f"out={tmp_path / out}", f"mesh={mesh}"])))
        for out, mesh in (("one", "null"), ("eight", "'data=2,fsdp=2,tensor=2'"))
    )
    np.testing.assert_allclose(eight.losses, one.losses, rtol=0, atol=1e-5)
    assert eight.evaluation is not None
    assert one.evaluation is not None
    np.testing.assert_allclose(eight.evaluation.metrics["loss"], one.evaluation.metrics["loss"], atol=1e-5)


def test_a_dry_run_counts_images(see, tmp_path, capsys):
    (tmp_path / "see.yaml").write_text(yaml.safe_dump(see))
    said = run(capsys, "train", tmp_path / "see.yaml", "--dry-run", "mesh='data=2,fsdp=2,tensor=2'")
    assert "80 images with padding" in said
    assert "kept for backward" in said
    assert not (tmp_path / "run").exists()


def test_inspection_shows_classes_and_pictures(see, pets, tmp_path, capsys):
    (tmp_path / "see.yaml").write_text(yaml.safe_dump(see))
    said = run(capsys, "data", "inspect", tmp_path / "see.yaml", "--rows", "2")
    assert "images of a class:\nblue ████████████████████████████████████████ 19\n red" in said
    first, last = said.partition("--- ")[2].split("\n--- ")
    assert first.startswith(f"{pets / 'train' / 'blue' / '0.png'}\n8 x 8 pixels, on average red")
    assert last.startswith(f"{pets / 'train' / 'red' / '9.png'}\n")
    assert first.rstrip().endswith("label: blue")
    red, _, blue = (float(part.split()[-1]) for part in first.split("average ")[1].split("\n")[0].split(", "))
    assert blue > red + 50

    dataset = job.read_data(config.parse(see))
    (shown,) = image_report.rows(dataset, 1)
    drawn = image_report.as_ansi(shown)
    assert drawn.count("▀") == 64 * 32
    top = image_report.as_ansi(shown._replace(image=np.full((8, 8, 3), (1, 2, 3), np.uint8)))
    assert top.startswith("\033[38;2;1;2;3;48;2;1;2;3m▀")
    run(capsys, "data", "inspect", tmp_path / "see.yaml", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img alt=") == 3
    assert "label: blue" in page
    assert image_report.rows(dataset, 0) == []


def test_what_is_shown_or_checked_of_a_configuration(see, pets, tmp_path, capsys):
    file = tmp_path / "see.yaml"
    file.write_text(yaml.safe_dump(see))
    assert "task: IMAGE_CLS" in run(capsys, "config", "show", file)
    assert "can be run" in run(capsys, "config", "validate", file)
    with pytest.raises(SystemExit):
        cli.main(["config", "validate", str(file), f"data.train={pets / 'absent'}", "data.max_length=9"])
    assert "data.max_length is for models that read texts" in capsys.readouterr().err


def test_an_adapter_that_peft_has_no_form_for_is_opened_with_its_processor(see, tmp_path):
    see |= {"method": {"kind": "houlsby", "reduction_factor": 4}, "train": {"max_steps": 1, "batch_size": 8}}
    see["data"].pop("eval")
    result = loop.train(config.parse(see))
    assert own.is_own(result.adapter)
    moved = shutil.copytree(result.adapter, tmp_path / "moved")
    opened = saved.open_model(None, moved)
    assert opened.processor == saved.open_model(see["model"]["path"], None).processor
    trained = jpeft.partition(opened.model)[1]
    for path, leaf in jax.device_get(result.state.trainable).items():
        np.testing.assert_array_equal(trained[path], leaf)
