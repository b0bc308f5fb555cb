# SPDX-License-Identifier: Apache-2.0
"""Writes bnb.npz: what bitsandbytes 0.50.2 makes of some weights, in 4 bits (NF4, FP4) and in 8, on a CPU.

It needs an environment of its own:

  python3.11 -m venv env && env/bin/pip install torch==2.13.0 && env/bin/pip install bitsandbytes==0.50.2 numpy
  env/bin/python tests/golden/make_bnb.py

The file holds the code book of the scales (`map`), some numbers as these codes (`rest`), and for every case the weight
`[d_out, d_in]` (those of 16 bits as float32), the packed codes, the largest magnitude of every block and the
dequantized weight; under `double/` the codes of these magnitudes, their own blocks' magnitudes, their mean and the
weight that results; under `fp4/` what FP4 makes of it; under `int8/` the codes and the largest magnitude of every row.
"""

import importlib
from pathlib import Path

import numpy as np
import torch

bnb = importlib.import_module("bitsandbytes.functional")

#: Whole blocks in a row; blocks across rows, the last one short; an odd number of weights; more than 256 blocks; and
#: weights of which a block, or what is left of the magnitudes without their mean, is zero.
CASES = {
    "rows": ((6, 128), torch.float32),
    "across": ((10, 24), torch.float32),
    "odd": ((5, 13), torch.float32),
    "many": ((270, 64), torch.float32),
    "half": ((6, 128), torch.bfloat16),
    "float16": ((7, 192), torch.float16),
    "zeros": ((8, 32), torch.float32),
    "tail": ((5, 13), torch.float32),
    "one": ((1, 1), torch.float32),
    "constant": ((9, 128), torch.float32),
}

#: What is made of the numbers drawn for a case: all of them zero, those of the short last block, all the same.
SPECIAL = {
    "zeros": np.zeros_like,
    "tail": lambda weight: np.where(np.arange(weight.size).reshape(weight.shape) < 64, weight, np.float32(0)),
    "constant": lambda weight: np.full_like(weight, 0.375),
}


def main() -> None:
    saved = {"map": bnb.create_dynamic_map().numpy()}
    for seed, (name, (shape, dtype)) in enumerate(CASES.items()):
        weight = torch.tensor(SPECIAL.get(name, lambda weight: weight)(draw(seed, shape))).to(dtype)
        saved[f"{name}/weight"] = weight.float().numpy()
        saved |= {f"{name}/{key}": value for key, value in results(weight).items()}
    np.savez_compressed(Path(__file__).with_name("bnb.npz"), **saved | rest())


def rest() -> dict[str, np.ndarray]:
    """Numbers of every size, beside the edges between two codes among them, in blocks of 256 whose largest is 1."""
    rng = np.random.default_rng(0)
    edges = (np.arange(65535) + 0.5) / 32767.5 - 1
    rest = np.concatenate([edges[::9] + rng.uniform(-1e-6, 1e-6, len(edges[::9])), rng.uniform(-1, 1, 4000) ** 5])
    rest[::256], rest[-100:] = 1, 0
    rest = np.concatenate([rest, np.zeros(-len(rest) % 256 + 256)]).astype(np.float32)  # a whole block of zeros
    codes, state = bnb.quantize_blockwise(torch.tensor(rest), blocksize=256)
    return {"rest": rest, "rest/codes": codes.numpy(), "rest/absmax": state.absmax.numpy()}


def draw(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """Rows of several scales, an outlier, and zeros where a block lies."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1)))
    weight[0, 0] = 9.0
    if weight.size > 128:
        weight.reshape(-1)[64:128] = 0
    return weight.astype(np.float32)


def results(weight: torch.Tensor) -> dict[str, np.ndarray]:
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    found = {"packed": packed, "absmax": state.absmax, "dequantized": bnb.dequantize_4bit(packed, state)}
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    found |= {
        "double/packed": packed,
        "double/absmax": state.absmax,
        "double/absmax2": state.state2.absmax,
        "double/mean": state.offset,
        "double/dequantized": bnb.dequantize_4bit(packed, state),
    }
    packed, state = bnb.quantize_4bit(weight, quant_type="fp4", blocksize=64)
    found |= {"fp4/packed": packed, "fp4/absmax": state.absmax, "fp4/dequantized": bnb.dequantize_4bit(packed, state)}
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weight.float())
    found |= {"int8/codes": codes, "int8/absmax": absmax}
    whole = (torch.uint8, torch.int8)
    return {key: (value if value.dtype in whole else value.float()).numpy() for key, value in found.items()}


if __name__ == "__main__":
    main()
