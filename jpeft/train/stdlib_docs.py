# SPDX-License-Identifier: Apache-2.0
"""A real text classification set that every Python installation carries: its standard library's docstrings.

The text is the beginning of a docstring, the label the area of the library that documents its module (chapters of
"The Python Standard Library", merged into eight). The sources are parsed, never imported, so building the set runs
no foreign code, needs no network and takes about two seconds. The same Python gives the same set, byte for byte.

What keeps it honest:
  - Split by module, a package being one module: `MODULES` names the modules of each split, so a test text comes from
    a module of which nothing was seen in training. The largest modules of an area train; its test has several.
  - No text occurs twice. Of texts whose words overlap by `NEAR` or more (Jaccard) one is kept, wherever they stand;
    a text whose very words stand in several areas says nothing and is dropped from all.
  - A module's own name in front of an identifier (`asyncio.Queue`) and a title that repeats it (`heapq -- ...`) are
    cut out. In running prose it stays: an "email message" is what the text is about.

Licence: the docstrings are part of Python, (c) Python Software Foundation, under the PSF License Version 2. They are
read from the user's own installation; jpeft ships none of them.

Example:
  >>> from jpeft.train import stdlib_docs
  >>> splits = stdlib_docs.build()
  >>> sorted(splits["test"][0])
  ['label', 'module', 'text']
"""

import ast
import json
import math
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict


class Example(TypedDict):
    """One labelled docstring; `label` is one of `AREAS`, `module` the top-level module it stands in."""

    text: str
    label: str
    module: str


#: Words of a text: shorter ones say nothing, longer ones are cut (the encoder's cost grows with length).
MIN_WORDS, MAX_WORDS = 10, 32

#: Share of common words from which two texts count as the same.
NEAR = 0.8

#: Most texts that one module gives, so that a few large packages do not drown the rest.
MAX_PER_MODULE = 60

SPLITS = ("train", "validation", "test")

#: area -> the modules of (train, validation, test). Only modules that every CPython 3.11 to 3.13 has, and that Linux
#: distributions do not split off (so no tkinter, turtle, idlelib, venv). Chapters that gather unlike things (generic
#: services of the operating system, program frameworks) are left out.
MODULES: dict[str, tuple[str, str, str]] = {
    "text and data formats": (
        "codecs difflib encodings gettext re string stringprep xml",
        "configparser tomllib",
        "base64 csv html json locale netrc plistlib quopri textwrap",
    ),
    "data types": (
        "_collections_abc _strptime copy copyreg datetime enum pprint reprlib",
        "calendar graphlib weakref",
        "bisect collections heapq types zoneinfo",
    ),
    "mathematics": (
        "colorsys decimal hashlib hmac operator random",
        "fractions functools",
        "numbers secrets statistics",
    ),
    "files and archives": (
        "dbm filecmp fnmatch genericpath io linecache pathlib pickle posixpath sqlite3 stat tarfile",
        "gzip lzma shutil",
        "bz2 fileinput glob ntpath shelve tempfile zipfile",
    ),
    "internet": (
        "email http imaplib mailbox smtplib socketserver urllib",
        "ipaddress poplib wsgiref",
        "ftplib mimetypes socket ssl uuid webbrowser xmlrpc",
    ),
    "concurrency": (
        "asyncio multiprocessing",
        "concurrent sched selectors",
        "_threading_local queue subprocess threading",
    ),
    "language": (
        "ast code codeop importlib inspect site typing warnings zipimport",
        "compileall contextlib modulefinder runpy symtable",
        "abc dataclasses dis pickletools pkgutil py_compile pyclbr tabnanny tokenize",
    ),
    "testing and debugging": (
        "bdb cProfile profile unittest",
        "doctest pstats",
        "pdb timeit trace tracemalloc",
    ),
}

#: The labels, in a fixed order.
AREAS = tuple(MODULES)


def build(stdlib: str | Path | None = None, seed: int = 0) -> dict[str, list[Example]]:
    """The set, as `{"train": [...], "validation": [...], "test": [...]}`, each split in a shuffled, fixed order.

    Args:
      stdlib: the folder of the standard library's sources; that of the running Python by default.
      seed: of the order, and of which texts a module over `MAX_PER_MODULE` gives.

    Raises:
      FileNotFoundError: a module of the table has no source there (an installation without `.py` files).
    """
    root = Path(stdlib or sysconfig.get_path("stdlib"))
    where = {module: split for _, split, module in _table()}
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example in _thinned(_distinct(list(_examples(root))), seed):
        splits[where[example["module"]]].append(example)
    for split, examples in splits.items():
        random.Random(f"{seed}/{split}").shuffle(examples)
    return splits


def write(folder: str | Path, stdlib: str | Path | None = None, seed: int = 0) -> dict[str, Path]:
    """Writes `build(stdlib, seed)` as `<split>.jsonl` (one example a line) into `folder`; returns the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}.jsonl" for split in SPLITS}
    for split, examples in build(stdlib, seed).items():
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
        files[split].write_text("".join(lines), encoding="utf-8")
    return files


def _table() -> Iterator[tuple[str, str, str]]:
    """(area, split, module) for every module of `MODULES`."""
    for area, row in MODULES.items():
        for split, modules in zip(SPLITS, row, strict=True):
            for module in modules.split():
                yield area, split, module


def _examples(root: Path) -> Iterator[Example]:
    """Every usable docstring of every module, in the order of the table and of the sources."""
    missing = [module for _, _, module in _table() if not _sources(root, module)]
    if missing:
        raise FileNotFoundError(
            f"the standard library at {root} has no source of {', '.join(missing)}; the set is built from the .py files"
            " of a CPython 3.11 or newer: pass the folder that holds them"
        )
    for area, _, module in _table():
        for source in _sources(root, module):
            for docstring in _docstrings(source):
                text = _text(docstring, module)
                if sum(bool(re.search("[A-Za-z]{2}", word)) for word in text.split()) >= MIN_WORDS:
                    yield Example(text=text, label=area, module=module)


def _sources(root: Path, module: str) -> list[Path]:
    """The files of a module or package, with its twin in pure Python (`_pydecimal`), without a package's own tests."""
    files = [root / f"{module}.py", root / f"_py{module}.py", *sorted((root / module).rglob("*.py"))]
    return [file for file in files if file.is_file() and not {"test", "tests"} & set(file.relative_to(root).parts)]


def _docstrings(source: Path) -> Iterator[str]:
    """The docstrings of a file: its own, then those of its classes and functions."""
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _text(docstring: str, module: str) -> str:
    """The first `MAX_WORDS` words as one line, up to the first doctest, without the module's name."""
    line = " ".join(docstring.split(">>>", maxsplit=1)[0].replace("`", "").split())
    line = re.sub(rf"^(module )?{module}(\.\w+)*\s*(--?|:|\u2014)\s+", "", line, flags=re.IGNORECASE)
    line = re.sub(rf"\b{module}\.(?=\w)", "", line)
    return " ".join(line.split()[:MAX_WORDS])


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def _distinct(examples: list[Example]) -> list[Example]:
    """Without texts that stand in several areas, and with one of each group of near-identical ones (the first)."""
    keys = [_words(example["text"]) for example in examples]
    areas = defaultdict(set)
    for key, example in zip(keys, examples, strict=True):
        areas[key].add(example["label"])
    frequency = Counter(word for key in keys for word in key)
    seen: dict[str, list[frozenset[str]]] = defaultdict(list)
    kept = []
    for key, example in zip(keys, examples, strict=True):
        # Sets that overlap by NEAR share a word among the rarest (1 - NEAR) of either, so only those are looked up.
        rare = sorted(key, key=lambda word: (frequency[word], word))[: len(key) - math.ceil(NEAR * len(key)) + 1]
        twins = (other for word in rare for other in seen[word])
        if len(areas[key]) == 1 and not any(len(key & other) >= NEAR * len(key | other) for other in twins):
            kept.append(example)
            for word in rare:
                seen[word].append(key)
    return kept


def _thinned(examples: list[Example], seed: int) -> list[Example]:
    """At most `MAX_PER_MODULE` examples of each module, drawn by the seed."""
    by_module: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_module[example["module"]].append(example)
    return [
        example
        for module, group in by_module.items()
        for example in random.Random(f"{seed}/{module}").sample(group, min(len(group), MAX_PER_MODULE))
    ]
