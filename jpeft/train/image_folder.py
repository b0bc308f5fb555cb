# SPDX-License-Identifier: Apache-2.0
"""Images in a folder for each class: `root/cat/1.png`, `root/dog/7.jpg`.

train = image_folder.find("pets/train")
test = image_folder.find("pets/test", names=train.names)
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from .records import DataError

#: Endings of files that are taken, small or capital.
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images and their classes, sorted by class and name.

    Attributes:
      files: one an image.
      labels: of each, the place of its class among the names, `[images]`.
      names: of the classes, in the order of the head's outputs.
    """

    files: tuple[Path, ...]
    labels: Int[np.ndarray, " images"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)


def find(root: str | Path, names: Sequence[str] | None = None) -> Labelled:
    """The images in the folders of `root`, whose names are the classes; files that are hidden are not seen.

    No image is opened: one that cannot be read is named when it is.

    Args:
      root: a folder that holds folders alone.
      names: of the classes, as they were trained; None takes the folders' own, sorted.

    Raises:
      FileNotFoundError: no such folder.
      DataError: an image outside a class's folder, a file that is no image, a class without an image, fewer than two
        classes, or one that is not among the names.
    """
    root, found = Path(root), by_class(root)
    if names is None and len(found) < 2:
        raise DataError(
            f"classification needs two labels or more; the folders in {root} are {', '.join(found) or 'none'}"
        )
    known = tuple(found if names is None else names)
    strange = [name for name in found if name not in known]
    if strange or not found:
        raise DataError(
            f"{root / strange[0]} is of none of the classes {', '.join(known)}" if strange else f"{root} holds no class"
        )
    labels = [known.index(name) for name, files in found.items() for _ in files]
    return Labelled(tuple(file for files in found.values() for file in files), np.array(labels, np.int32), known)


def by_class(root: str | Path) -> dict[str, list[Path]]:
    """The files of every class, both sorted by name. Raises as `find`, but of the number of classes and their names."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    inside = _seen(root)
    loose = [entry for entry in inside if not entry.is_dir()]
    if loose:
        raise DataError(f"{loose[0]} is in no class; images stand in a folder that is called as their class")
    return {folder.name: _images(folder) for folder in inside}


def _images(folder: Path) -> list[Path]:
    files = _seen(folder)
    other = [file for file in files if not file.is_file() or file.suffix.lower() not in ENDINGS]
    if other and other[0].is_dir():
        raise DataError(f"{other[0]} is no image file but a folder; name the folder whose own folders are the classes")
    if other:
        raise DataError(f"{other[0]} is no image file; they end in {', '.join(ENDINGS)}")
    if not files:
        raise DataError(f"{folder} holds no image of its class")
    return files


def _seen(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
