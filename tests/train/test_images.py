# SPDX-License-Identifier: Apache-2.0
"""Images as transformers' ViTImageProcessor makes them ready, and what is said of files that are none."""

import json

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.image_utils import load_image

from jpeft.models import CheckpointError
from jpeft.train import images
from jpeft.train.records import DataError

#: Both round to float32 in the same places.
CLOSE = 1e-6

PLAIN = {"image_processor_type": "ViTImageProcessor"}
OTHER = {
    "do_resize": True, "size": {"height": 24, "width": 40}, "resample": 3, "rescale_factor": 1 / 127.5,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    """Files of every mode: colours, grey, a palette, with transparency, black and white; and turned by a camera."""
    rng = np.random.default_rng(0)
    values = Image.fromarray(rng.integers(0, 256, (37, 53, 3), dtype=np.uint8))
    made = {}
    for mode in ("RGB", "L", "P", "RGBA", "LA", "1"):
        made[f"{mode}.png"] = tmp_path / f"{mode}.png"
        values.convert(mode).save(made[f"{mode}.png"])
    exif = Image.Exif()
    exif[0x0112] = 6
    made["turned.jpg"] = tmp_path / "turned.jpg"
    values.save(made["turned.jpg"], exif=exif)
    return made


def _folder(folder, said):
    folder.mkdir(exist_ok=True)
    (folder / images.FILE).write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    "said",
    [PLAIN, PLAIN | OTHER, {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "image_mean": [0.1, 0.2, 0.3]}]
    + [PLAIN | {"size": {"height": 16, "width": 16}, "resample": filter} for filter in range(6)]
    + [PLAIN | OTHER | {name: False} for name in ("do_rescale", "do_normalize")],
)
def test_values_are_those_of_transformers(pictures, tmp_path, said):
    ours = images.load(_folder(tmp_path / "model", said))
    theirs = transformers.ViTImageProcessor(**said)
    found = ours.batch([*pictures.values()])
    expected = theirs([load_image(str(file)) for file in pictures.values()], return_tensors="np")["pixel_values"]
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=CLOSE)


def test_without_resizing_images_have_one_size(pictures, tmp_path):
    processor = images.load(_folder(tmp_path / "model", PLAIN | {"do_resize": False}))
    file, turned = pictures["RGB.png"], pictures["turned.jpg"]
    expected = (np.moveaxis(np.asarray(Image.open(file)), -1, 0) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(processor.batch([file, file])[1], expected, rtol=CLOSE, atol=CLOSE)
    with pytest.raises(DataError, match=r"turned\.jpg has \(53, 37\) pixels and .*RGB\.png \(37, 53\)"):
        processor.batch([file, turned])
    with pytest.raises(DataError, match="no image file was given"):
        processor.batch([])


def test_bytes_are_read_as_files_are(pictures):
    file = pictures["P.png"]
    np.testing.assert_array_equal(images.read(file.read_bytes()), images.read(file))


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "absent"])
def test_a_file_that_is_no_image_is_named(pictures, tmp_path, damage):
    whole = pictures["RGB.png"].read_bytes()
    file = tmp_path / "broken.png"
    if damage != "absent":
        file.write_bytes({"text": b"a cat", "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    with pytest.raises(DataError, match=r"broken\.png: it is no image that can be read"):
        images.read(file)
    if damage == "cut":
        with pytest.raises(DataError, match=r"rows\.parquet, row 3: it is no image"):
            images.read(file.read_bytes(), "rows.parquet, row 3")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "is of a CLIPImageProcessor; images are made ready as by ViT"),
        ({"do_center_crop": True}, "is of a ViTImageProcessor with do_center_crop"),
        ({"size": {"shortest_edge": 224}}, r"size is a height and a width, .*got \{'shortest_edge': 224\}"),
        ({"size": 0}, "size is a height and a width, both above 0, .*got 0"),
        ({"resample": 9}, "resample is the number of a filter, 0 to 5; got 9"),
        ({"do_resize": "yes"}, "do_resize is true or false; got 'yes'"),
        ({"image_mean": [0.5]}, r"image_mean is 3 finite numbers; got \[0.5\]"),
        ({"image_std": [0.5, 0, 1]}, r"image_std is 3 finite numbers above 0; got \[0.5, 0, 1\]"),
        ({"rescale_factor": None}, "rescale_factor is 1 finite number; got None"),
        ([], "must hold a JSON object, holds a list"),
    ],
)
def test_what_is_not_done_is_refused(tmp_path, said, message):
    with pytest.raises(CheckpointError, match=message):
        images.load(_folder(tmp_path / "model", said))


def test_a_folder_without_a_processor_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*preprocessor_config\.json, which says how images"):
        images.load(tmp_path)
