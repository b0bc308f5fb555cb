# SPDX-License-Identifier: Apache-2.0
"""Every contract that asks for a `case` runs on every line of the table."""


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        from contracts.table import CASES  # not before the tests' own set-up: it starts JAX

        metafunc.parametrize("case", CASES, ids=lambda case: f"{case.method} on {case.model}")
