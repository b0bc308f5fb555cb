# SPDX-License-Identifier: Apache-2.0
"""What the sections say of values that cannot be: a line each, with the key and what came."""

from collections.abc import Mapping

#: A key that is none of a section's is refused, and a number that is not finite (pydantic's settings).
FORBID = {"extra": "forbid", "allow_inf_nan": False}


def at_least_one(values: Mapping[str, int | None]) -> list[str]:
    """What counts something; None counts nothing."""
    return [f"{key} must be 1 or more, got {value}" for key, value in values.items() if value is not None and value < 1]


def positive(values: Mapping[str, float | None]) -> list[str]:
    """What must be above 0, and not NaN; None is left out."""
    return [f"{key} must be positive, got {x}" for key, x in values.items() if x is not None and not x > 0]


def shares(values: Mapping[str, float]) -> list[str]:
    """What is a part of a whole, and not all of it."""
    return [f"{key} must be in [0, 1), got {value}" for key, value in values.items() if not 0 <= value < 1]
