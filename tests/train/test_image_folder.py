# SPDX-License-Identifier: Apache-2.0
"""Images in folders by class: what is found, what is refused, a ViT that learns two colours, and what commands say."""

import re

import jax
import numpy as np
import optax
import pytest
import torch
import transformers
from painted import paint, write_vit
from transformers.image_utils import load_image

import jpeft
from jpeft import models
from jpeft.io.card import Card
from jpeft.train import cli, image_folder, images, saved
from jpeft.train.losses import cls_loss, cls_sums
from jpeft.train.records import DataError
from jpeft.train.step import begin, make_step

#: float32 against float32, at logits of unit scale.
CLOSE = 1e-5


def _trained(base, batch):
    """LoRA after 40 updates on one batch."""
    graphdef, trainable, frozen = jpeft.partition(
        jpeft.adapt(base, jpeft.LoRA(rank=4, alpha=8, targets=["q_proj", "v_proj"]), key=jax.random.key(1))
    )
    tx = optax.adam(1e-2)
    step, state = make_step(graphdef, cls_sums, tx), begin(tx, trainable)
    for _ in range(40):
        state, _ = step(state, frozen, jax.tree.map(lambda x: x[None], batch), None)
    return jpeft.combine(graphdef, state.trainable, frozen)


def test_files_are_found_by_class(tmp_path):
    root = paint(tmp_path / "train", 2, 0)
    (root / "red" / ".DS_Store").touch()
    (root / "red" / "1.png").rename(root / "red" / "1.PNG")
    found = image_folder.find(root)
    assert [str(file.relative_to(root)) for file in found.files] == [
        "blue/0.png",
        "blue/1.png",
        "red/0.png",
        "red/1.PNG",
    ]
    assert found.names == ("blue", "red")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert len(found) == 4
    assert image_folder.find(root, ("red", "green", "blue")).labels.tolist() == [2, 2, 0, 0]


def test_a_vit_learns_colours_from_files_and_is_the_same_when_opened_again(tmp_path):
    model = write_vit(tmp_path / "vit", "IMAGE_CLS")
    train = image_folder.find(paint(tmp_path / "train", 16, 0))
    test = image_folder.find(paint(tmp_path / "test", 8, 1), train.names)
    processor = images.load(model)
    batch, held = ({"pixel_values": processor.batch(part.files), "labels": part.labels} for part in (train, test))

    trained = _trained(models.load(model), batch)
    assert (np.argmax(trained(held["pixel_values"]), -1) == held["labels"]).mean() > 0.9

    jpeft.export_peft(trained, tmp_path / "adapter")
    opened = jpeft.import_peft(models.load(model), tmp_path / "adapter")
    np.testing.assert_allclose(cls_loss(opened, held), cls_loss(trained, held), rtol=1e-6)

    jpeft.export_merged(trained, tmp_path / "merged", tokenizer_from=model)
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged")
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "merged")
    pixels = processor([load_image(str(file)) for file in test.files], return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**pixels).logits.numpy()
    np.testing.assert_allclose(logits, trained(held["pixel_values"]), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (["a/1.png", "loose.png"], r"loose\.png is in no class"),
        (["a/1.png"], r"needs two labels or more; the folders in .* are a$"),
        (["a/1.png", "b/notes.txt"], r"b/notes\.txt is no image file; they end in \.png"),
        (["a/1.png", "b/deep/1.png"], r"b/deep is no image file but a folder; name the folder whose"),
        (["a/1.png", "b/.hidden.png"], r"b holds no image of its class"),
        ([], r"the folders in .* are none"),
    ],
)
def test_what_is_no_folder_of_classes_is_refused(tmp_path, made, message):
    root = tmp_path / "root"
    root.mkdir()
    for name in made:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    with pytest.raises(DataError, match=message):
        image_folder.find(root)


def test_classes_are_those_that_were_trained(tmp_path):
    root = paint(tmp_path / "test", 1, 0)
    with pytest.raises(DataError, match=r"test/blue is of none of the classes red, green"):
        image_folder.find(root, ("red", "green"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no class"):
        image_folder.find(tmp_path / "empty", ("red", "green"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        image_folder.find(tmp_path / "absent")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """(adapter, its base without a head, images): LoRA that learned two colours, with its head, as saved."""
    root = tmp_path_factory.mktemp("lora")
    base = write_vit(root / "vit")
    head = models.load(base, "IMAGE_CLS", key=jax.random.key(4), num_labels=2)
    train = image_folder.find(paint(root / "train", 16, 0))
    batch = {"pixel_values": images.load(base).batch(train.files), "labels": train.labels}
    model = _trained(head, batch)
    saved.save_adapter(model, root / "adapter", base, saved.Info(("blue", "red"), None), Card())
    return root / "adapter", base, paint(root / "test", 5, 3)


def _run(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


def _theirs(folder, files):
    """Probabilities of a merged folder in transformers, float64: `[images, classes]`."""
    model = transformers.ViTForImageClassification.from_pretrained(folder).double()
    processor = transformers.ViTImageProcessor.from_pretrained(folder)
    pixels = processor([load_image(str(file)) for file in files], return_tensors="pt")["pixel_values"].double()
    with torch.no_grad():
        return torch.softmax(model(pixels).logits, -1).numpy(), model.config.id2label or {}


def test_an_adapter_of_images_is_merged_and_predicts_and_is_measured_as_transformers_does(capsys, lora, tmp_path):
    adapter, _, root = lora
    code, _, err = _run(capsys, "merge", "--adapter", adapter, "--out", tmp_path / "merged")
    assert (code, err) == (0, "")
    found = image_folder.find(root)
    truth, names = _theirs(tmp_path / "merged", found.files)
    assert names == {0: "blue", 1: "red"}
    assert (truth.argmax(-1) == found.labels).mean() > 0.5  # it tells them apart

    for named in (["--adapter", adapter], ["--model", tmp_path / "merged"]):
        code, out, _ = _run(capsys, "predict", *named, *found.files)
        assert code == 0
        assert out.splitlines() == [
            f"{names[int(row.argmax())]}\t{row.max():.4f}\t{file}" for row, file in zip(truth, found.files, strict=True)
        ]
        code, out, _ = _run(capsys, "eval", *named, "--data", root, "--batch-size", 4)  # the last batch has 2 of 10
        assert code == 0
        said = dict(line.split() for line in out.splitlines()[1:])
        assert out.splitlines()[0] == "10 rows -> 10 images"
        loss = -np.log(truth[np.arange(10), found.labels]).mean()
        np.testing.assert_allclose(float(said["loss"]), loss, rtol=CLOSE, atol=CLOSE)
        np.testing.assert_allclose(float(said["accuracy"]), (truth.argmax(-1) == found.labels).mean(), atol=1e-6)


def test_an_adapter_of_images_is_exported_with_its_labels_and_processor(capsys, lora, tmp_path):
    adapter, base, root = lora
    assert _run(capsys, "export", "--adapter", adapter, "--out", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / images.FILE).read_bytes() == (base / images.FILE).read_bytes()
    file = image_folder.find(root).files[3]
    first, again = (_run(capsys, "predict", "--adapter", each, file) for each in (adapter, tmp_path / "again"))
    assert first == again
    assert first[0] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cannot identify"), (b"some words", "cannot identify"), (None, "truncated")],
)
def test_a_bad_file_is_named_by_the_commands(capsys, lora, tmp_path, content, message):
    adapter, _, root = lora
    good = image_folder.find(root).files[0]
    for name in ("blue", "red"):
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "1.png").write_bytes(good.read_bytes())
    bad = tmp_path / "bad" / "red" / "été 🌞.png"
    bad.write_bytes(good.read_bytes()[:-60] if content is None else content)
    for arguments in (["predict", good, bad], ["eval", "--data", tmp_path / "bad"]):
        code, _, err = _run(capsys, arguments[0], "--adapter", adapter, *arguments[1:])
        assert code != 0
        assert "été 🌞.png: it is no image that can be read" in err
        assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--max-length", "8", "x.png"], "reads images .IMAGE_CLS.; --max-length is for models that read t"),
        (
            ["eval", "--data", "ROOT", "--text", "a", "--max-length", "9"],
            "--text, --max-length is for models that read",
        ),
        (["eval", "--data", "ROOT", "--label", "b"], "no column 'b'; it has image, label"),
        (["eval", "--data", "ROOT/blue"], "is in no class"),
        (["eval", "--data", "ROOT", "--batch-size", "0"], "--batch-size is 1 or more, got 0"),
        (["eval", "--task", "sst2"], "IMAGE_CLS"),
        (["merge", "--out", "OUT/out", "--text", "NOTES"], "reads images, not texts; jpeft predict takes image files"),
        (["predict", "ROOT/absent.png"], r"absent\.png"),
    ],
)
def test_what_is_for_texts_is_refused_of_a_model_of_images(capsys, lora, tmp_path, arguments, message):
    adapter, _, root = lora
    notes = tmp_path / "notes.txt"
    notes.write_text("a line\n")
    placed = [
        part.replace("ROOT", str(root)).replace("OUT", str(tmp_path)).replace("NOTES", str(notes)) for part in arguments
    ]
    code, _, err = _run(capsys, placed[0], "--adapter", adapter, *placed[1:])
    assert code != 0
    assert re.search(message, err), err


def test_a_model_of_texts_has_no_processor(bert):
    opened = saved.open_model(bert, None)
    with pytest.raises(ValueError, match="reads texts, not images"):
        _ = opened.processor
