# SPDX-License-Identifier: Apache-2.0
"""Every contract that asks for a `case` runs on every line of the table; what is not of the fast lane, in the slow."""

import pytest


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        from contracts.table import CASES  # not before the tests' own set-up: it starts JAX

        metafunc.parametrize("case", [_param(case) for case in CASES])


def _param(case):
    marks = () if case.model in case.line.fast else (pytest.mark.slow,)
    return pytest.param(case, id=f"{case.method} on {case.model}", marks=marks)
