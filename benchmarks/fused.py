# SPDX-License-Identifier: Apache-2.0
"""Products with quantized kernels by Pallas beside XLA's way, forward and gradient, on the device that is there.

    python benchmarks/fused.py [--schemes nf4 int8] [--rows 1 32 4096] [--sizes 4096x4096 4096x14336] [--repeats 7]

Each way runs a stack of layers with codes of their own, in turns; the gain is the ratio of the medians. What is printed
are lines of `MEASURED` in `jpeft/_fused_rule.py`, with the device and the versions above them: put those there, and the
rule takes them. On a CPU the kernel is interpreted: take small sizes, `--rows 8 --sizes 256x256`.
"""

import argparse
import datetime
import statistics
from typing import Any

import jax
from _gpu_jpeft import product, versions

PLATFORMS = {"gpu": "cuda"}


def gain(case: dict[str, Any], repeats: int) -> float:
    """XLA's median time over Pallas', of calls in turns."""
    seconds: dict[str, list[float]] = {"xla": [], "pallas": []}
    for _ in range(repeats):
        for way, own in seconds.items():
            own += product(case, 1, way=way)["seconds"]
    return statistics.median(seconds["xla"]) / statistics.median(seconds["pallas"])


def main() -> None:
    """Measures and prints lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["nf4", "nf4_double", "int8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32, 512, 4096])
    parser.add_argument("--sizes", nargs="+", default=["4096x4096", "4096x14336", "14336x4096"], metavar="D_INxD_OUT")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    platform = PLATFORMS.get(jax.default_backend(), jax.default_backend())
    found = versions()
    print(f"    # {found['device']}, jax {found['jax']}, {datetime.date.today()}, benchmarks/fused.py")
    for scheme in options.schemes:
        for size in options.sizes:
            d_in, d_out = map(int, size.split("x"))
            for rows in options.rows:
                case = {"scheme": scheme, "dtype": options.dtype, "rows": rows, "d_in": d_in, "d_out": d_out}
                measured = gain(case | {"layers": options.layers}, options.repeats)
                names = f'"{platform}", "{scheme}", "{options.dtype}"'
                print(f"    Line({names}, {rows}, {d_in}, {d_out}, {measured:.3g}),", flush=True)


if __name__ == "__main__":
    main()
