# SPDX-License-Identifier: Apache-2.0
"""Writes loftq.npz: what peft 0.21.2's `loftq_init` makes of some weights with bitsandbytes 0.50.2.

It needs the environment of make_bnb.py with peft==0.21.2 and transformers==5.23.0 beside it. peft computes on a GPU by
name; here its function runs as it stands, with that name replaced.

The file holds for every case the weight `[d_out, d_in]`, rank and iterations, and what comes out: the dequantized
weight, A `[rank, d_in]` and B `[d_out, rank]`.
"""

import inspect
from pathlib import Path

import numpy as np
import torch
from peft.utils import loftq_utils

#: d_out, d_in, rank, iterations
CASES = ((24, 64, 4, 1), (24, 64, 4, 4), (30, 20, 3, 2))


def main() -> None:
    source = inspect.getsource(loftq_utils.loftq_init).replace('else "cuda"', 'else "cpu"')
    names = dict(vars(loftq_utils))
    exec(source, names)
    saved = {}
    for i, (d_out, d_in, rank, iterations) in enumerate(CASES):
        weight = torch.tensor(np.random.default_rng(i).standard_normal((d_out, d_in)).astype(np.float32))
        base, a, b = names["loftq_init"](weight, 4, rank, iterations)
        saved |= {f"{i}/{k}": v.numpy() for k, v in {"weight": weight, "base": base, "A": a, "B": b}.items()}
        saved |= {f"{i}/rank": np.array(rank), f"{i}/iterations": np.array(iterations)}
    np.savez_compressed(Path(__file__).with_name("loftq.npz"), **saved)


if __name__ == "__main__":
    main()
