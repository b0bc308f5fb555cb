# SPDX-License-Identifier: Apache-2.0
"""Images as a training reads them: from every form the same values, in the same order, each bad one by name."""

import hashlib
import itertools
import json
import shutil

import numpy as np
import painted
import pytest
import transformers
from PIL import Image
from transformers.image_utils import load_image

from jpeft.models import CheckpointError
from jpeft.train import config, images, job, pictures, picturing
from jpeft.train.records import DataError

#: Both round to float32 in the same places.
CLOSE = 1e-6


def read(see, *overrides, **data):
    """The data set of a configuration with other options of `data`."""
    return job.read_data(config.parse(config.overridden(see | {"data": see["data"] | data}, overrides)))


def named(feed):
    """(name, label, pixel values) of every image, in the order of their names' last parts."""
    found = {}
    for batch in feed.buckets.in_order():
        arrays = feed.collate(batch)
        flat = [x.reshape(-1, *x.shape[2:]) for x in (arrays["labels"], arrays["pixel_values"])]
        for row, label, values in zip(batch.rows, *flat, strict=False):
            found[feed.examples.names[row]] = int(label), values
    return found


def _epoch(feed):
    return [*itertools.islice(feed.walk(0), feed.buckets.num_batches)]


def test_values_are_those_of_transformers_on_the_same_files(see, pets, vit):
    dataset = read(see)
    assert dataset.label_names == ("blue", "red")
    assert len(dataset.train.examples) == 37
    theirs = transformers.ViTImageProcessor.from_pretrained(vit)
    found = named(dataset.train)
    assert sorted(found) == sorted(map(str, (pets / "train").glob("*/*.png")))
    for file, (label, values) in found.items():
        expected = theirs([load_image(file)], return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(values, expected, rtol=CLOSE, atol=CLOSE)
        assert ("blue", "red")[label] == file.split("/")[-2]


@pytest.fixture(scope="module")
def forms(pets, tmp_path_factory):
    """The training images in every form, by its name."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("forms")
    shutil.copytree(pets / "train", root / "pictures")
    files = sorted((root / "pictures").glob("*/*.png"))
    rows = [(str(file.relative_to(root)), file.parent.name) for file in files]
    (root / "rows.jsonl").write_text("".join(json.dumps({"image_path": f, "label": c}) + "\n" for f, c in rows))
    (root / "rows.csv").write_text("img,label\n" + "".join(f"{root / f},{c}\n" for f, c in rows))
    (root / "named.csv").write_text("who,what\n" + "".join(f"{c},{f}\n" for f, c in rows))
    held = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": [c for _, c in rows]}
    pyarrow.parquet.write_table(pyarrow.table(held), root / "rows.parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(held, features=features).save_to_disk(root / "saved")
    (root / "parts").mkdir()
    shutil.copy(root / "rows.parquet", root / "parts" / "train-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("form", ["rows.jsonl", "rows.csv", "named.csv", "rows.parquet", "saved", "parts"])
def test_every_form_gives_the_same_images(see, forms, form):
    columns = {"columns": {"image": "what", "label": "who"}} if form == "named.csv" else {}
    dataset, folder = (
        read(see, train=str(forms / each), eval=[], **more) for each, more in ((form, columns), ("pictures", {}))
    )
    assert dataset.label_names == folder.label_names
    np.testing.assert_array_equal(dataset.train.examples.labels, folder.train.examples.labels)
    everything = range(37)
    np.testing.assert_array_equal(dataset.train.examples.pixels(everything), folder.train.examples.pixels(everything))


def test_the_classes_of_a_data_set_have_its_names(see, pets, tmp_path):
    """Whatever their order, and so the numbers in the rows."""
    import datasets

    for folder, names in (("one", ["red", "blue"]), ("other", ["blue", "red"])):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        files = sorted((pets / "train").glob("*/*.png"))
        rows = {"img": [*map(str, files)], "label": [file.parent.name for file in files]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / folder)
    dataset = read(see, train=str(tmp_path / "one"))
    assert dataset.label_names == ("red", "blue")
    assert dataset.train.examples.labels.tolist() == [1] * 19 + [0] * 18
    assert dataset.eval is not None
    assert dataset.eval.examples.labels.tolist() == [1] * 7 + [0] * 7
    assert not dataset.files.keys() - {*map(str, pets.glob("*/*/*.png"))}
    with pytest.raises(DataError, match=r"name the classes of column 'label' in different ways, \['blue', 'red'\] and"):
        read(see, train=[str(tmp_path / "one"), str(tmp_path / "other")])


def test_a_part_several_sources_and_weights(see, pets):
    whole = read(see).train.examples
    some = read(see, train={"path": str(pets / "train"), "split": "train[10:15]"}, label_names=["blue", "red"]).train
    assert some.examples.names == whole.names[10:15]
    sources = [{"path": str(pets / "train"), "weight": 2.5}, {"path": str(pets / "validation"), "weight": 1}]
    both = read(see, train=sources).train.examples
    counts = [both.names.count(name) for name in whole.names]
    assert sorted({*counts}) == [2, 3]
    assert sum(counts) == 2 * 37 + 18  # half of 37, rounded to even
    assert len(both) - sum(counts) == 14


def test_a_data_set_of_another_split_is_named(see, pets):
    with pytest.raises(DataError, match=r"one split, 'train'.*has none called 'test'"):
        read(see, train={"path": str(pets / "train"), "split": "test"})


def test_an_epoch_has_every_image_once_in_an_order_that_can_be_repeated(see):
    feed = read(see, "train.batch_size=5", "train.accumulation=2").train
    assert feed.rows == 5
    epoch = [*itertools.islice(feed.walk(3), feed.buckets.num_batches)]
    assert [fed.arrays["pixel_values"].shape for fed in epoch] == [(2, 5, 3, 8, 8)] * 4
    assert sum((fed.arrays["labels"] >= 0).sum() for fed in epoch) == 37
    assert sum(fed.real for fed in epoch) == 37 * 5  # a class token and 2 x 2 patches
    assert sum(fed.padded for fed in epoch) == 40 * 5
    rows = [row for batch in feed.buckets.epoch(3, 0) for row in batch.rows]
    assert sorted(rows) == [*range(37)]
    third, *_ = feed.walk(3, epoch[1].after), 0
    again = next(third)
    assert again.start == epoch[2].start
    for name, values in epoch[2].arrays.items():
        np.testing.assert_array_equal(again.arrays[name], values)
    assert not np.array_equal(next(feed.walk(4)).arrays["pixel_values"], epoch[0].arrays["pixel_values"])
    with pytest.raises(DataError, match="no position in this data"):
        next(feed.walk(4, epoch[1].after))


def test_a_process_makes_its_own_rows_alone(see):
    feed = read(see, "train.batch_size=6", "train.accumulation=2").train
    (whole,), (own,) = ([*itertools.islice(feed.walk(0, own=rows), 1)] for rows in (None, frozenset({1, 4})))
    for name in whole.arrays:
        np.testing.assert_array_equal(own.arrays[name][:, [1, 4]], whole.arrays[name][:, [1, 4]])
    assert not own.arrays["pixel_values"][:, [0, 2, 3, 5]].any()
    assert (own.arrays["labels"][:, [0, 2, 3, 5]] == -100).all()


def test_images_that_take_too_much_memory_are_decoded_again(see, pets, tmp_path, monkeypatch):
    train = shutil.copytree(pets / "train", tmp_path / "train")
    held = next(read(see, train=str(train)).train.walk(0))
    monkeypatch.setattr(picturing, "HELD", 10 * 8 * 8 * 3)
    feed = read(see, train=str(train)).train
    assert str(feed.examples).startswith("37 rows -> 37 images; 27 are decoded for every batch")
    again = next(feed.walk(0))
    for name in held.arrays:
        np.testing.assert_array_equal(again.arrays[name], held.arrays[name])
    shutil.copy(train / "red" / "0.png", train / "red" / "17.png")
    with pytest.raises(DataError, match=r"red/17\.png is not the file that it was before the training began"):
        _epoch(feed)
    (train / "red" / "17.png").unlink()
    with pytest.raises(DataError, match=r"red/17\.png: it was there before the training began"):
        _epoch(feed)


def test_hashes_are_of_every_file(see, pets, tmp_path):
    train = shutil.copytree(pets / "train", tmp_path / "train")
    before = read(see, train=str(train))
    assert before.files == {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (*train.glob("*/*.png"), *(pets / "validation").glob("*/*.png"))
    }
    Image.open(train / "red" / "3.png").rotate(90).save(train / "red" / "3.png")
    after = read(see, train=str(train))
    assert [file for file in after.files if after.files[file] != before.files[file]] == [str(train / "red" / "3.png")]
    assert [source for source in after.digests if after.digests[source] != before.digests[source]] == [str(train)]


def test_parts_of_one_folder_have_a_hash_each(see, pets):
    parts = {name: {"path": str(pets / "train"), "split": split} for name, split in
             (("train", "train[:15]"), ("eval", "train[15:]"))}  # fmt: skip
    dataset = read(see, label_names=["blue", "red"], **parts)
    assert {*dataset.digests} == {f"{pets / 'train'}, train[:15]", f"{pets / 'train'}, train[15:]"}
    assert len({*dataset.digests.values()}) == 2
    assert len(dataset.files) == 37


@pytest.mark.parametrize("cached", [False, True])
def test_bad_images_are_named_or_skipped_and_counted(see, pets, tmp_path, capsys, cached):
    train = shutil.copytree(pets / "train", tmp_path / "train")
    whole = (train / "red" / "5.png").read_bytes()
    (train / "red" / "5.png").write_bytes(whole[: len(whole) // 2])
    (train / "blue" / "été 🌞.png").write_text("some words")
    cache = {"cache": str(tmp_path / "kept")} if cached else {}
    with pytest.raises(DataError, match=r"\.png: it is no image that can be read: .*; data\.on_bad_row=skip leaves"):
        read(see, train=str(train), **cache)
    for _ in range(2):
        examples = read(see, train=str(train), on_bad_row="skip", **cache).train.examples
        assert (len(examples), examples.rows, examples.skipped) == (36, 38, 2)
        assert str(train / "red" / "5.png") not in examples.names
        np.testing.assert_array_equal(examples.labels, [name.split("/")[-2] == "red" for name in examples.names])
        said = capsys.readouterr().out
        assert "été 🌞.png: it is no image" in said
        assert "red/5.png: it is no image" in said
    with pytest.raises(DataError, match=r"more than data\.max_bad_rows=1 rows are bad"):
        read(see, train=str(train), on_bad_row="skip", max_bad_rows=1, **cache)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "absent.png", "label": "red"}, r"rows\.jsonl:3: image .*/absent\.png: it cannot be read: No such"),
        ({"image": "", "label": "red"}, r"rows\.jsonl:3: column 'image' must name an image file, or hold one; got ''"),
        ({"image": 7, "label": "red"}, r"rows\.jsonl:3: column 'image' must name .* got 7"),
        ({"label": "red"}, r"rows\.jsonl:3: it has no 'image'"),
        ({"image": "0.png", "label": "green"}, r"rows\.jsonl:3: label 'green' is out of range"),
        ({"image": "notes.png", "label": "red"}, r"rows\.jsonl:3: image .*/notes\.png: it is no image that can"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_its_line(see, pets, tmp_path, row, message):
    shutil.copy(pets / "train" / "red" / "0.png", tmp_path / "0.png")
    (tmp_path / "notes.png").write_text("words")
    rows = [{"image": "0.png", "label": "red"}, {"image": "0.png", "label": "blue"}, row]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    given = {"train": str(tmp_path / "rows.jsonl"), "label_names": ["red", "blue"], "eval": []}
    with pytest.raises(DataError, match=message):
        read(see, **given)
    examples = read(see, **given, on_bad_row="skip").train.examples
    assert (len(examples), examples.skipped) == (2, 1)


def test_images_of_another_size_are_bad_where_nothing_resizes_them(see, vit, pets, tmp_path):
    model = shutil.copytree(vit, tmp_path / "vit")
    (model / images.FILE).write_text(json.dumps(painted.PROCESSOR | {"do_resize": False}))
    tree = see | {"model": see["model"] | {"path": str(model)}}
    with pytest.raises(DataError, match=r"png: it has \d+ x \d+ pixels and the model reads 8 x 8; prep.* resizes none"):
        read(tree)
    for file in pets.glob("*/*/*.png"):
        target = tmp_path / file.relative_to(pets)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((8, 8), Image.Resampling.BILINEAR).save(target)
    found = read(tree, train=str(tmp_path / "train"), eval=str(tmp_path / "validation"))
    expected = read(see)
    np.testing.assert_array_equal(found.train.examples.pixels(range(37)), expected.train.examples.pixels(range(37)))


def test_a_processor_that_is_not_the_models_is_refused(see, vit, tmp_path):
    model = shutil.copytree(vit, tmp_path / "vit")
    (model / images.FILE).write_text(json.dumps(painted.PROCESSOR | {"size": 16}))
    with pytest.raises(CheckpointError, match=r"makes images of 3 channels and \(16, 16\) pixels, .* 3 and \(8, 8\)"):
        read(see | {"model": see["model"] | {"path": str(model)}})


def test_resized_images_are_kept_and_made_anew_when_anything_changed(see, pets, tmp_path, monkeypatch, capsys):
    train, kept = shutil.copytree(pets / "train", tmp_path / "train"), tmp_path / "kept"
    given = {"train": str(train), "eval": [], "cache": str(kept)}
    first = read(see, **given).train.examples
    pixels = first.pixels(range(37))
    assert sorted(file.suffix for file in kept.iterdir()) == [".json", ".npy"]
    np.testing.assert_array_equal(pixels, read(see, train=str(train)).train.examples.pixels(range(37)))

    decoded, made = picturing.decoded, []
    monkeypatch.setattr(picturing, "decoded", lambda source: made.append(source) or decoded(source))
    again = read(see, **given).train.examples
    assert not made
    np.testing.assert_array_equal(again.pixels(range(37)), pixels)

    (file,) = kept.glob("*.npy")
    harmed = bytearray(file.read_bytes())
    harmed[-7] ^= 1
    file.write_bytes(harmed)
    np.testing.assert_array_equal(read(see, **given).train.examples.pixels(range(37)), pixels)
    assert len(made) == 37
    assert "are damaged; they are made anew" in capsys.readouterr().out

    Image.open(train / "red" / "3.png").rotate(180).save(train / "red" / "3.png")
    read(see, **given)
    assert len(made) == 74
    assert len([*kept.glob("*.npy")]) == 2


@pytest.mark.parametrize(
    ("task", "path", "message"),
    [
        ("IMAGE_CLS", "bert", "model.task=IMAGE_CLS is for models that read images, and .* reads texts"),
        ("SEQ_CLS", "vit", "model.task=SEQ_CLS is for models that read texts, and .* reads images"),
    ],
)
def test_a_task_that_is_not_the_models_is_refused(see, request, task, path, message):
    with pytest.raises(ValueError, match=message):
        read(see | {"model": {"path": str(request.getfixturevalue(path)), "task": task}})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=64", "data.max_length is for models that read texts; IMAGE_CLS reads images"),
        ("data.text=a", "data.text is for models that read texts"),
        ("data.txt=document", "data.txt is for models that read texts"),
        ("data.num_widths=2", "data.num_widths is for models that read texts"),
        ("data.window=8", "data.window is for models that read texts"),
        ("data.loss_on=all", "data.loss_on is for models that read texts"),
        ("data.packing=best_fit", "data.packing is for CAUSAL_LM"),
        ("data.streaming=true", "data.streaming is for CAUSAL_LM"),
        ("data.template=plain", "data.template is for CAUSAL_LM; IMAGE_CLS has no messages"),
        ("data.longer=split", "data.longer=split is for CAUSAL_LM"),
        ("data.stride=4", "data.stride is for QUESTION_ANS, got IMAGE_CLS"),
        ("data.max_target=4", "data.max_target is for SEQ_2_SEQ_LM, got IMAGE_CLS"),
        ("train.samples=2", "train.samples is for a model that writes"),
        ("train.objective=dpo", "train.objective=dpo is for CAUSAL_LM, got IMAGE_CLS"),
        ("train.best=perplexity", "train.best is one of loss, accuracy, macro_f1"),
    ],
)
def test_what_has_no_meaning_for_images_is_refused_by_name(see, override, message):
    with pytest.raises(config.ConfigError, match=message):
        config.parse(config.overridden(see, [override]))


def test_a_form_for_texts_is_refused(see, pets):
    with pytest.raises(DataError, match="columns image, label, which fit no form for IMAGE_CLS"):
        read(see, format="sentence")
    assert len(read(see, format="image").train.examples) == 37


def test_threads_keep_the_order():
    assert [*pictures.threaded(lambda x: x * x, range(700))] == [x * x for x in range(700)]
