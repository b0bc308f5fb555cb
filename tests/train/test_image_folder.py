# SPDX-License-Identifier: Apache-2.0
"""Images in folders by class: what is found, what is refused, and a ViT that learns two colours from files."""

import json

import jax
import numpy as np
import optax
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import load_image

import jpeft
from jpeft import models
from jpeft.train import image_folder, images
from jpeft.train.losses import cls_loss, cls_sums
from jpeft.train.records import DataError
from jpeft.train.step import begin, make_step

#: float32 against float32, at logits of unit scale.
CLOSE = 1e-5

VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def _paint(root, count, seed):
    """Noisy pictures, more red or more blue, of various sizes."""
    rng = np.random.default_rng(seed)
    for channel, name in ((2, "blue"), (0, "red")):
        (root / name).mkdir(parents=True)
        for at in range(count):
            values = rng.integers(0, 120, (*rng.integers(9, 20, 2), 3))
            values[..., channel] += 100
            Image.fromarray(values.astype(np.uint8)).save(root / name / f"{at}.png")
    return root


def test_files_are_found_by_class(tmp_path):
    root = _paint(tmp_path / "train", 2, 0)
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
    model = tmp_path / "vit"
    models.save(models.build(VIT, "IMAGE_CLS", key=jax.random.key(0), num_labels=2), model)
    (model / images.FILE).write_text(json.dumps({"image_processor_type": "ViTImageProcessor", "size": 8}))
    train = image_folder.find(_paint(tmp_path / "train", 16, 0))
    test = image_folder.find(_paint(tmp_path / "test", 8, 1), train.names)
    processor = images.load(model)
    batch, held = ({"pixel_values": processor.batch(part.files), "labels": part.labels} for part in (train, test))

    base = models.load(model)
    graphdef, trainable, frozen = jpeft.partition(
        jpeft.adapt(base, jpeft.LoRA(rank=4, alpha=8, targets=["q_proj", "v_proj"]), key=jax.random.key(1))
    )
    tx = optax.adam(1e-2)
    step, state = make_step(graphdef, cls_sums, tx), begin(tx, trainable)
    for _ in range(40):
        state, _ = step(state, frozen, jax.tree.map(lambda x: x[None], batch), None)
    trained = jpeft.combine(graphdef, state.trainable, frozen)
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
        (["a/1.png", "b/deep/1.png"], r"b/deep is no image file"),
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
    root = _paint(tmp_path / "test", 1, 0)
    with pytest.raises(DataError, match=r"test/blue is of none of the classes red, green"):
        image_folder.find(root, ("red", "green"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no class"):
        image_folder.find(tmp_path / "empty", ("red", "green"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        image_folder.find(tmp_path / "absent")
