# SPDX-License-Identifier: Apache-2.0
"""The ready hybrids: what they are made of, and the numbers of parameters that `adapters` 1.3.0 gives for them."""

import jax
import pytest
from flax import nnx

import jpeft
from jpeft._hybrids import MAM, UniPELT
from jpeft.models.bert import PRESETS

KEY = jax.random.key(0)
NAMES = {method.__name__ for method in jpeft.METHODS.values()}
PARTS = {MAM: ("PrefixTuning", "ParallelAdapter"), UniPELT: ("LoRA", "PrefixTuning", "Pfeiffer")}


@pytest.fixture(params=PARTS, ids=lambda make: make.__name__, name="make")
def _make(request):
    missing = sorted({*PARTS[request.param]} - NAMES)
    if missing:
        pytest.skip(f"{', '.join(missing)} absent from jpeft.METHODS")
    return request.param


def test_parts(make):
    assert tuple(type(part).__name__ for part in make().methods) == PARTS[make]


def test_counts_of_bert_base(make):
    expected = {
        MAM: (15_402_272, 7_091_712),
        UniPELT: (294_912 + 24 * 769, 9_857_024 + 12 * 769, 894_528 + 12 * 769),
    }
    assert sum(expected[MAM]) == 22_493_984
    assert sum(expected[UniPELT]) == 11_083_376
    bert = lambda: jpeft.models.build(PRESETS["bert-base-uncased"], "FEATURE_EXTRACTION", key=KEY)  # noqa: E731
    found = jpeft.summary(nnx.eval_shape(lambda: jpeft.adapt(bert(), make(), key=KEY)))
    assert tuple(row.trainable for row in found.rows) == expected[make]


def test_fields_reach_the_parts(make):
    options = {"num_tokens": 3, "hidden_size": 4, "reduction_factor": 8, "layers": [1], "modules_to_save": ()}
    options |= {"scaling": 2.0} if make is MAM else {"rank": 2, "alpha": 3, "targets": ["key"]}
    for part in make(**options).methods:
        for field, value in options.items():
            if field in vars(part):
                assert getattr(part, field) in (value, tuple(value) if isinstance(value, list) else value)
        assert part.layers == (1,)
        assert getattr(part, "gate", False) == (make is UniPELT)
