# SPDX-License-Identifier: Apache-2.0
"""Run as a program by test_values.py: says for every saved case whether its leaves give its outputs here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  (the environment of the tests, before jax is imported)
import jax
import numpy as np
import safetensors.numpy
from contracts.table import FIRST, IDS

import jpeft


def main(folder: Path) -> None:
    for i, case in enumerate(FIRST):
        graphdef, _, frozen = jpeft.partition(case.fresh(key=jax.random.key(99)))
        saved = safetensors.numpy.load_file(folder / f"{i}.safetensors")
        trainable = {path: value for path, value in saved.items() if path not in frozen}
        frozen |= {path: value for path, value in saved.items() if path in frozen}
        got = case.run(jpeft.combine(graphdef, trainable, frozen), IDS)
        print("same" if np.array_equal(got, np.load(folder / f"{i}.npy")) else f"{case}: differs")


main(Path(sys.argv[1]))
