# SPDX-License-Identifier: Apache-2.0
"""Figures for programs: pass@k without bias, and how alike two programs' tokens are."""

import io
import re
import tokenize
from collections.abc import Sequence

import numpy as np


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The probability that one of k programs passes, of which c of n drawn ones did (Chen et al., 2021, eq. 1).

      1 - C(n - c, k) / C(n, k) = 1 - prod over i = n - c + 1 .. n of (1 - k / i)

    Raises:
      ValueError: fewer than k were drawn, of which nothing follows, or c is not in 0 .. n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} takes {k} or more programs of each problem, got {num_samples}")
    if not 0 <= num_passed <= num_samples:
        raise ValueError(f"of {num_samples} programs, {num_passed} cannot have passed")
    if num_samples - num_passed < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num_samples - num_passed + 1, num_samples + 1)))


def each_pass_at_k(passed: Sequence[Sequence[bool]], k: int) -> list[float]:
    """pass@k of every problem.

    Args:
      passed: of each problem, whether each of its programs passed.
      k: at most the number of programs of every problem.

    Raises:
      ValueError: as `pass_at_k`.
    """
    return [pass_at_k(len(row), sum(row), k) for row in passed]


def token_jaccard(one: str, other: str) -> float:
    """|A ∩ B| / |A ∪ B| of the sets of Python tokens, without comments and layout; 1 where both are empty."""
    a, b = _tokens(one), _tokens(other)
    return len(a & b) / len(a | b) if a | b else 1.0


_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def _tokens(source: str) -> set[str]:
    """The tokens of a source; of one that is no Python, its words and signs."""
    try:
        found = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return set(re.findall(r"\w+|[^\w\s]", source))
    return {token.string for token in found if token.type not in _LAYOUT}
