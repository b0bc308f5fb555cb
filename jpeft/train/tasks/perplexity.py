# SPDX-License-Identifier: Apache-2.0
"""Perplexity of plain text, per token, and per byte, in which models of different vocabularies can be compared."""

from .kinds import Likelihood

TASK = Likelihood(published={"GPT-2 small on WikiText-103, per word": "37.50 (Radford et al., 2019)"})
