# SPDX-License-Identifier: Apache-2.0
"""What is drawn, counted: by every rule the frequencies are the probabilities that transformers' warpers leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers.generation import logits_process

from jpeft.models import _sampling

VOCAB, DRAWS = 24, 20_000
LOGITS = np.random.default_rng(5).normal(scale=1.5, size=VOCAB).astype(np.float32)
HELD = np.array([[1, 5, 5, 9, 20]])
#: rules -> transformers' processors, in its order
RULES = {
    "temperature": ({"temperature": 0.7}, [logits_process.TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 7}, [logits_process.TopKLogitsWarper(7)]),
    "top_p": ({"top_p": 0.8}, [logits_process.TopPLogitsWarper(0.8)]),
    "min_p": ({"min_p": 0.1}, [logits_process.MinPLogitsWarper(0.1)]),
    "repetition_penalty": ({"repetition_penalty": 1.9}, [logits_process.RepetitionPenaltyLogitsProcessor(1.9)]),
    "all": (
        {"repetition_penalty": 1.4, "temperature": 1.8, "top_k": 14, "top_p": 0.9, "min_p": 0.08},
        [
            logits_process.RepetitionPenaltyLogitsProcessor(1.4),
            logits_process.TemperatureLogitsWarper(1.8),
            logits_process.TopKLogitsWarper(14),
            logits_process.TopPLogitsWarper(0.9),
            logits_process.MinPLogitsWarper(0.08),
        ],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_draws_have_transformers_probabilities(name):
    """Chi-square over the tokens that are left; one in a thousand such statistics of equal distributions is above."""
    told, processors = RULES[name]
    logits = torch.tensor(LOGITS[None])
    for processor in processors:
        logits = processor(torch.tensor(HELD), logits)
    expected = DRAWS * torch.softmax(logits.double(), -1)[0].numpy()
    nothing = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": None}
    rules = _sampling.rules(**{**nothing, **told})
    seen = jnp.broadcast_to(_sampling.held(jnp.asarray(HELD), jnp.ones_like(HELD), VOCAB), (DRAWS, VOCAB))
    keys = jax.random.split(jax.random.key(11), DRAWS)
    drawn = _sampling.choose(jnp.broadcast_to(LOGITS, (DRAWS, VOCAB)), seen, rules, keys, 2)
    observed = np.bincount(np.asarray(drawn), minlength=VOCAB)
    left = expected > 0
    assert left.sum() > 4
    assert observed[~left].sum() == 0
    statistic = ((observed - expected)[left] ** 2 / expected[left]).sum()
    assert statistic < scipy.stats.chi2.ppf(0.999, left.sum() - 1)
    plain = DRAWS * scipy.special.softmax(LOGITS.astype(np.float64))  # what no rule would give is told apart
    assert ((observed - plain) ** 2 / plain).sum() > scipy.stats.chi2.ppf(0.999, VOCAB - 1)


def test_the_likeliest_is_the_first_of_the_largest():
    """As `jnp.argmax`: ties, infinities, NaN in a row and rows of it alone."""
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 4, (40, 37)).astype(np.float32)
    logits[3], logits[4], logits[5, 7:9], logits[6, 20] = -np.inf, np.nan, np.nan, np.inf
    np.testing.assert_array_equal(_sampling.likeliest(jnp.asarray(logits)), jnp.argmax(logits, -1))


def test_tokens_are_drawn_as_jax_draws_them():
    logits = 3 * jax.random.normal(jax.random.key(0), (6, 50))
    keys = jax.random.split(jax.random.key(1), 6)
    drawn = _sampling.choose(logits, None, _sampling.rules(1.0, None, None, None, None), keys, 4)
    expected = [jax.random.categorical(jax.random.fold_in(key, 4), row) for key, row in zip(keys, logits, strict=True)]
    np.testing.assert_array_equal(drawn, np.stack(expected))
