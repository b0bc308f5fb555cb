# SPDX-License-Identifier: Apache-2.0
"""The demo's data set: the same every time, no text and no module on two sides, every area in every split."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from jpeft.train import stdlib_docs
from jpeft.train.stdlib_docs import AREAS, MAX_PER_MODULE, MAX_WORDS, MIN_WORDS, MODULES, NEAR, SPLITS

#: A text long enough to be kept; its words spelt backwards are another one.
WORDS = """amber birch cedar delta ember fjord grove heath
    inlet juniper knoll larch maple north ocean pebble""".split()
BACK = [word[::-1] for word in WORDS]


@pytest.fixture(scope="module", name="splits")
def _splits():
    return stdlib_docs.build()


def fake_stdlib(folder, **docstrings):
    """A standard library of one docstring a function in the named modules; importing any of its files fails."""
    for row in MODULES.values():
        for module in " ".join(row).split():
            functions = [f"def f{i}():\n    {text!r}\n" for i, text in enumerate(docstrings.get(module, ()))]
            (folder / f"{module}.py").write_text("".join(functions) + "raise SystemExit('imported')\n")
    return folder


def texts(splits):
    return {example["text"]: example for examples in splits.values() for example in examples}


def test_sizes_and_areas(splits):
    sizes = {split: len(examples) for split, examples in splits.items()}
    assert list(sizes) == list(SPLITS)
    assert sizes["train"] > 1200
    assert min(sizes["validation"], sizes["test"]) > 350
    assert len(AREAS) == 8
    for split, floor in zip(SPLITS, (80, 20, 45), strict=True):
        counts = Counter(example["label"] for example in splits[split])
        assert set(counts) == set(AREAS)
        assert min(counts.values()) >= floor, counts
        assert max(counts.values()) <= 0.3 * sizes[split], counts


def test_texts_are_one_line_of_bounded_length(splits):
    for text in texts(splits):
        assert MIN_WORDS <= len(text.split()) <= MAX_WORDS, text
        assert "\n" not in text
        assert ">>>" not in text


def test_no_module_is_in_two_splits_or_areas(splits):
    places = defaultdict(set)
    for split, examples in splits.items():
        for example in examples:
            places[example["module"]].add((split, example["label"]))
    assert all(len(where) == 1 for where in places.values())
    for split, column in zip(SPLITS, zip(*MODULES.values(), strict=True), strict=True):
        assert {example["module"] for example in splits[split]} <= set(" ".join(column).split())


def test_no_two_texts_are_alike(splits):
    """Jaccard overlap of all pairs, by one matrix product."""
    bags = [set(re.findall("[a-z]+", text.lower())) for text in texts(splits)]
    column = {word: i for i, word in enumerate(sorted(set().union(*bags)))}
    words = np.zeros((len(bags), len(column)), np.float32)
    for row, bag in enumerate(bags):
        words[row, [column[word] for word in bag]] = 1
    common = words @ words.T
    sizes = common.diagonal()
    overlap = common / (sizes[:, None] + sizes[None, :] - common)
    np.fill_diagonal(overlap, 0)
    assert len(texts(splits)) == sum(len(examples) for examples in splits.values())
    assert overlap.max() < NEAR


def test_no_module_gives_more_than_its_share(splits):
    counts = Counter(example["module"] for examples in splits.values() for example in examples)
    assert max(counts.values()) == MAX_PER_MODULE


def test_the_same_python_gives_the_same_bytes(tmp_path):
    program = "import sys; from jpeft.train.stdlib_docs import write; write(sys.argv[1])"
    digests = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", program, str(tmp_path / seed)], check=True, env=environment)
        files = [tmp_path / seed / f"{split}.jsonl" for split in SPLITS]
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]


def test_write_keeps_every_example(tmp_path):
    library = fake_stdlib(tmp_path, statistics=["Die Größe of " + " ".join(WORDS)])
    files = stdlib_docs.write(tmp_path / "out", library)
    read = {split: [json.loads(line) for line in file.read_text("utf-8").splitlines()] for split, file in files.items()}
    assert read == stdlib_docs.build(library)
    assert [example["label"] for example in read["test"]] == ["mathematics"]


def test_sources_are_parsed_and_never_imported(tmp_path):
    splits = stdlib_docs.build(fake_stdlib(tmp_path, email=[" ".join(WORDS)]))
    assert splits["train"] == [{"text": " ".join(WORDS), "label": "internet", "module": "email"}]


def test_a_text_of_two_areas_is_dropped_and_a_repeated_one_kept_once(tmp_path):
    shared, repeated = " ".join(WORDS), " ".join(BACK)
    nearly = repeated.replace("rebma", "changed")
    library = fake_stdlib(
        tmp_path, email=[shared, repeated], statistics=[shared.upper()], ssl=[nearly, f"{repeated}!"], http=[repeated]
    )
    kept = texts(stdlib_docs.build(library))
    assert list(kept) == [repeated]
    assert kept[repeated]["module"] == "email"


def test_names_examples_and_length_are_cut(tmp_path):
    library = fake_stdlib(
        tmp_path,
        heapq=["heapq -- " + " ".join(WORDS)],
        asyncio=["Waits on an `asyncio.Queue` until " + " ".join(reversed(WORDS)) + "\n\n    >>> wait()\n    3"],
        email=["An email message " + " ".join(f"{word}{word}" for word in WORDS * 3)],
        json=["Too short, by nine words that it lacks."],
    )
    assert set(texts(stdlib_docs.build(library))) == {
        " ".join(WORDS),
        "Waits on an Queue until " + " ".join(reversed(WORDS)),
        "An email message " + " ".join([f"{word}{word}" for word in WORDS * 3][: MAX_WORDS - 3]),
    }


def test_packages_private_twins_and_tests_of_packages(tmp_path):
    library = fake_stdlib(tmp_path)
    (library / "decimal.py").unlink()
    (library / "xml" / "sax").mkdir(parents=True)
    (library / "xml" / "tests").mkdir()
    for file, words in (("_pydecimal.py", WORDS), ("xml/sax/handler.py", BACK), ("xml/tests/all.py", WORDS + BACK)):
        (library / file).write_text(f'"""{" ".join(words)}"""\n')
    kept = texts(stdlib_docs.build(library))
    assert {text: example["module"] for text, example in kept.items()} == {
        " ".join(WORDS): "decimal",
        " ".join(BACK): "xml",
    }


def test_the_seed_orders_and_thins(tmp_path):
    many = [
        " ".join(f"{word}{chr(97 + i // 26)}{chr(97 + i % 26)}" for word in WORDS) for i in range(2 * MAX_PER_MODULE)
    ]
    library = fake_stdlib(tmp_path, unittest=many)
    first, again, other = (stdlib_docs.build(library, seed)["train"] for seed in (0, 0, 1))
    assert first == again
    assert len(first) == len(other) == MAX_PER_MODULE
    assert {e["text"] for e in first} != {e["text"] for e in other}


def test_missing_sources_are_named(tmp_path):
    library = fake_stdlib(tmp_path)
    (library / "xmlrpc.py").unlink()
    (library / "abc.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no source of xmlrpc, abc; .*pass the folder"):
        stdlib_docs.build(library)


def test_the_licence_of_the_texts_is_stated():
    assert "PSF License Version 2" in (stdlib_docs.__doc__ or "")
