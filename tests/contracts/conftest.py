# SPDX-License-Identifier: Apache-2.0
"""Every contract that asks for a `case` runs on every line of the table; what is not of the fast lane, in the slow.

A contract marked `costly` compiles several programs a case. Of it the fast lane has LoRA on every model, and of every
other method the first line.
"""

import pytest


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        from contracts.table import CASES  # not before the tests' own set-up: it starts JAX

        costly = metafunc.definition.get_closest_marker("costly") is not None
        metafunc.parametrize("case", [_param(case, costly) for case in CASES])


def _param(case, costly):
    from contracts.table import FIRST

    fast = case.model in case.line.fast and not (costly and case.method != "lora" and case not in FIRST)
    return pytest.param(case, id=f"{case.method} on {case.model}", marks=() if fast else (pytest.mark.slow,))
