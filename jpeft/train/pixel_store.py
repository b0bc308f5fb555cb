# SPDX-License-Identifier: Apache-2.0
"""Resized images on disk, under a name that stands for all that made them: files, processor, code.

The bytes lie in one file, from which batches are read without holding it in memory; beside it stands its hash, so that
one which was changed or cut is made anew, and that is said.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from .pictures import Resized
from .readers import Sight


def key_of(digests: Sequence[str], sight: Sight) -> str:
    """SHA-256 of all that resized images follow from: the hashes of their files, in order, among it."""
    said = [_code_digest(), sight.digest, sight.image, *digests]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def kept(
    folder: str, key: str, count: int, image: tuple[int, int], make: Callable[[], Iterator[Resized | str]]
) -> Iterator[Resized | str]:
    """The images that are kept under a key, or why one cannot be read; made, and kept, where there are none.

    Args:
      folder: where.
      key: of `key_of`.
      count: how many.
      image: height and width.
      make: what makes them.
    """
    if not count:
        return
    file = Path(folder) / f"{key}.npy"
    if file.with_suffix(".json").is_file():
        found = _read(file, (count, *image, 3))
        if found is not None:
            yield from found
            return
    _write(file, (count, *image, 3), make())
    yield from _read(file, (count, *image, 3)) or ()


@functools.cache
def _code_digest() -> str:
    """SHA-256 of the code that decodes and resizes, and of what it stands on."""
    code = (Path(__file__).parent / "images.py").read_bytes()
    return hashlib.sha256(version("pillow").encode() + code).hexdigest()


def _read(file: Path, shape: tuple[int, ...]) -> list[Resized | str] | None:
    """The images of a file, or None where they are not what was written."""
    from .progress import say

    try:
        said = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        pixels: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        sound = pixels.shape == shape and _digest(pixels) == said["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        sound, said, pixels = False, {}, np.zeros(0)
    if not sound:
        say(f"the kept images in {file} are damaged; they are made anew")
        return None
    bytes_of = np.asarray(pixels)
    bad = {int(number): reason for number, reason in said["bad"].items()}
    return [bad.get(number, bytes_of[number]) for number in range(shape[0])]


def _digest(pixels: UInt8[np.ndarray, "..."]) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def _write(file: Path, shape: tuple[int, ...], images: Iterator[Resized | str]) -> None:
    """Writes images beside their place, moves them there whole, and then says that they are there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    bad = {}
    name = _beside(file)
    try:
        pixels = np.lib.format.open_memmap(name, "w+", np.uint8, shape)
        for number, image in enumerate(images):
            if isinstance(image, str):
                bad[number] = image
            else:
                pixels[number] = image
        pixels.flush()
        said = json.dumps({"sha256": _digest(pixels), "bad": bad})
        del pixels
        os.replace(name, file)
        name = _beside(file)
        Path(name).write_text(said, encoding="utf-8")
        os.replace(name, file.with_suffix(".json"))
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _beside(file: Path) -> str:
    """A new empty file in the same folder."""
    handle, name = tempfile.mkstemp(suffix=".part", prefix=f"{file.stem[:16]}.", dir=file.parent)
    os.close(handle)
    return name
