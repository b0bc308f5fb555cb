# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks make of their figures: tables, ratios, exponents, and what is said of what was not measured."""

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(name="load")
def _load(monkeypatch):
    """Imports a benchmark as its own script would."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def side(rate: float, peak: float | None = 10.0, **more: Any) -> dict[str, Any]:
    return {"tokens_per_s": rate, "second": 4096 / rate, "peak_gib": peak, **more}


def results(cases: dict[str, Any], small: bool = False) -> dict[str, Any]:
    versions = {"device": "NVIDIA H100 (gpu)", "jax": "0.10.2"}
    return {"date": "2026-01-02", "small": small, "steps": 8, "python": "3.11", "versions": versions, "cases": cases}


def test_the_gpu_page_holds_what_was_asked_beside_what_was_found(load):
    lora = {
        "jpeft": side(12600, 30.0, remat="none", compile=41.26),
        "eager": side(6000, 40.0),
        "compiled": side(9000, 45),
    }
    page = load("gpu").page(results({"lora": lora, "qlora": {"jpeft": side(10000)}}))
    assert "NVIDIA H100 (gpu), Python 3.11, jax 0.10.2" in page
    assert "| LoRA, Llama-3-8B | jpeft | 12,600 | 325.1 | 30.00 | 41.3 | none | 1.00 |" in page
    assert "| LoRA, Llama-3-8B | compiled | 9,000 | 455.1 | 45.00 | - |  | 0.71 |" in page
    assert "tokens/s of jpeft, at least | 12,500 | 12,600.00 | yes |" in page
    assert "times the faster of peft's, at least | 1.5 | 1.40 | **no** |" in page
    assert "times peft's memory, at most | 1 | 0.75 | yes |" in page
    assert "times LoRA's tokens/s, at least | 0.85 | 0.79 | **no** |" in page


def test_what_failed_is_a_line_and_no_figure(load):
    cases = {"lora": {"jpeft": {"failed": "ended with 1: out of memory"}, "eager": side(6000), "compiled": side(7000)}}
    page = load("gpu").page(results(cases | {"qlora": {"jpeft": side(10000)}}))
    assert "| LoRA, Llama-3-8B | jpeft | - | - | - | - | ended with 1: out of memory | - |" in page
    assert page.count("not measured") == 4


def test_small_figures_meet_no_bar(load):
    page = load("gpu").page(results({"lora": {"jpeft": side(99999)}}, small=True))
    assert "say nothing of a GPU" in page
    assert "asked" not in page


def test_every_case_has_sizes_for_a_cpu(load):
    cases = load("_gpu_cases")
    for name in cases.CASES:
        case = cases.sized(name, True)
        assert cases.tokens(case) <= 4096
        assert cases.tokens(cases.sized(name, False)) >= cases.tokens(case)


def test_growth_is_the_slope_at_the_end_and_is_held_against_the_algorithms(load):
    growth = load("growth")
    sizes = [1, 2, 4, 8, 16]
    assert growth.slope(sizes, [100 + x**2 for x in sizes]) < growth.slope(sizes, [float(x**2) for x in sizes])
    assert abs(growth.slope(sizes, [3.0 * x**1.5 for x in sizes]) - 1.5) < 1e-9
    points = {"values": sizes, "seconds": sizes, "bytes": sizes, "flops": sizes}
    fine = points | {"slopes": {"seconds": 1.1, "bytes": 0.9, "flops": 1.0}}
    bad = points | {"slopes": {"seconds": 2.0, "bytes": 1.9, "flops": 1.0}}
    lines = growth.table({"rows": fine, "seq": bad})
    assert lines[2] == "| rows | 1 | 16 | 1.10 | 1.00 | 0.90 | 1.00 | no worse |"
    assert lines[3].endswith("| **time and memory worse** |")


def test_starts_are_held_against_their_bars(load):
    startup = load("startup")
    imports = dict(zip(startup.IMPORTS, (1.0, 1.2, 2.0), strict=True))
    depth = {4: 2.0, 8: 2.5, 32: 3.2, 80: 4.0}
    page = "\n".join(startup.report({"import": imports, "depth": depth, "again": {"empty": 20.0, "full": 8.0}}))
    assert "| what `import jpeft` adds | 0.20 s | at most 0.3 s |" in page
    assert "| compiling 4 and 32 layers | 2.0 and 3.2 s: 1.60 | at most 1.5 |" in page
    assert "| first update, full cache | 8.0 s | at most 10 s |" in page
