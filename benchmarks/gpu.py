# SPDX-License-Identifier: Apache-2.0
"""Everything that is asked of a GPU, in one run: LoRA, QLoRA, full fine-tuning, writing, many adapters, products.

    python benchmarks/gpu.py [--small] [--cases lora qlora ...] [--steps 8] [--page docs/results/gpu.md] [--json FILE]

Every side of a case is a process of its own, which has the whole device; a side that fails is a line that says why.
`--small` runs the same code at sizes for a CPU, whose figures say nothing. Prints the page, and writes it and its
figures where told: by default nowhere with `--small`, and without it to docs/results/gpu.md and gpu.json.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from _gpu_cases import AIMS, CASES, sized, tokens

RESULTS = Path(__file__).parents[1] / "docs" / "results"
#: Seconds after which a side counts as stuck.
PATIENCE = 1800


def worker(name: str, side: str, options: argparse.Namespace) -> None:
    """The child's part: runs one side of a case and prints its figures as a line of JSON."""
    case = sized(name, options.small)
    process, function = case["sides"][side]
    if process == "jpeft":
        import _gpu_jpeft as sides
    else:
        import _gpu_torch as sides
    found = sides.SIDES[function](case, options.steps)
    print(json.dumps({"versions": sides.versions(), **found}), flush=True)


def measure(name: str, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one side, from a process of its own; or what went wrong, as `failed`."""
    command = [sys.executable, __file__, "--worker", name, side, "--steps", str(options.steps)]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    if options.small:
        command.append("--small")
        environment |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {PATIENCE} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        return {"failed": f"ended with {done.returncode}: {said[-1].strip()[:200]}"}
    found = json.loads(lines[-1])
    second = statistics.median(found.pop("seconds"))
    return found | {"second": second, "tokens_per_s": tokens(sized(name, options.small)) / second}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, case by case."""
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "small": options.small,
        "steps": options.steps,
    }
    results |= {"machine": platform.machine(), "python": platform.python_version(), "versions": {}, "cases": {}}
    for name in options.cases:
        results["cases"][name] = {}
        for side in sized(name, options.small)["sides"]:
            found = measure(name, side, options)
            results["versions"] |= found.pop("versions", {})
            results["cases"][name][side] = found
            print(f"{name} {side}: {found}", file=sys.stderr, flush=True)
    return results


def page(results: dict[str, Any]) -> str:
    """The page of results: device and versions, a table of all sides, what was asked beside what was found."""
    small = "**Sizes for a CPU, to see that everything runs: the figures say nothing of a GPU.**\n"
    asked = [] if results["small"] else [line for name in results["cases"] for line in _aims(name, results["cases"])]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items() if name != "device")
    return "\n".join(
        [
            "# On a GPU\n",
            f"`python benchmarks/gpu.py`, {results['date']}, {results['versions'].get('device', 'no device')}, "
            f"Python {results['python']}, {versions}. Medians of {results['steps']} steps, each side in a process of "
            "its own.\n",
            *([small] if results["small"] else []),
            "Tokens are those trained on, those written, or rows of products. Beside jpeft stands transformers, with "
            "peft's LoRA, by sdpa: eager steps and steps by torch.compile (compiled), writing with its two caches.\n",
            "| case | side | tokens/s | ms a step | peak GiB | compile s | kept | to the first |",
            "|---|---|---:|---:|---:|---:|---|---:|",
            *(line for name, sides in results["cases"].items() for line in _lines(name, sides)),
            *(["", "| asked | bar | found | |", "|---|---:|---:|---|", *asked] if asked else []),
            "",
        ]
    )  # fmt: skip


def _lines(name: str, sides: dict[str, Any]) -> list[str]:
    first = next(iter(sides.values())).get("tokens_per_s")
    lines = []
    for side, found in sides.items():
        if "failed" in found:
            lines.append(f"| {CASES[name]['title']} | {side} | - | - | - | - | {found['failed']} | - |")
            continue
        rate = found["tokens_per_s"]
        figures = f"{rate:,.0f} | {1e3 * found['second']:,.1f} | {_number(found['peak_gib'], 2)}"
        figures += f" | {_number(found.get('compile'), 1)}"
        ratio = "-" if first is None else f"{rate / first:.2f}"
        lines.append(f"| {CASES[name]['title']} | {side} | {figures} | {found.get('remat', '')} | {ratio} |")
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _aims(name: str, cases: dict[str, Any]) -> list[str]:
    lines = []
    for figure, bar, words in AIMS.get(name, []):
        found = _figure(figure, name, cases)
        met = (
            "not measured"
            if found is None
            else ("yes" if (found <= bar if "at most" in words else found >= bar) else "**no**")
        )
        lines.append(f"| {CASES[name]['title']}: {words} | {bar:,g} | {_number(found, 2)} | {met} |")
    return lines


def _figure(figure: str, name: str, cases: dict[str, Any]) -> float | None:
    """A figure of a case's first side, its own or over what it is compared with; None where a part is not there."""
    first, *others = cases[name].values()
    rest = [other for other in others if "failed" not in other]
    if "failed" in first:
        return None
    if figure in ("tokens_per_s", "peak_gib"):
        return first[figure]
    if figure == "over_lora":
        lora = cases.get("lora", {}).get("jpeft", {}).get("tokens_per_s")
        return None if lora is None else first["tokens_per_s"] / lora
    if not rest:
        return None
    if figure == "memory":
        peaks = [other["peak_gib"] for other in rest if other["peak_gib"]]
        return None if not peaks or not first["peak_gib"] else first["peak_gib"] / min(peaks)
    return first["tokens_per_s"] / max(other["tokens_per_s"] for other in rest)


def main() -> None:
    """Runs the cases, or one side of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--page", type=Path, help="Markdown (docs/results/gpu.md, and nowhere with --small)")
    parser.add_argument("--json", type=Path, help="figures (docs/results/gpu.json, and nowhere with --small)")
    options = parser.parse_args()
    if options.worker:
        name, side = options.worker
        return worker(name, side, options)
    results = run(options)
    text = page(results)
    print(text)
    if not options.small:
        options.page = options.page or RESULTS / "gpu.md"
        options.json = options.json or RESULTS / "gpu.json"
    for file, content in ((options.page, text), (options.json, json.dumps(results, indent=2) + "\n")):
        if file:
            file.write_text(content)


if __name__ == "__main__":
    main()
