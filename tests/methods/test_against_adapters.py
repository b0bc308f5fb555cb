# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters, Compacter and AdapterFusion against AdapterHub's library: outputs and gradients.

The batch is padded, and there are numbers in every leaf. Three differences are by intention: the library's coupling
("nice") on BERT acts after the norm of the embeddings, jpeft's on the token vectors, so it is compared on Llama; its
gate is a mean over padding too; and under a fusion of parallel adapters it adds the stream twice. And two of UniPELT's
are not compared: the library leaves alpha / rank out of its LoRA, so here both are 2.

Of some cases there is also a training of 20 updates: each loss, and the weights after the last one.
"""

from typing import Any

import adapters_oracle as oracle
import jax
import numpy as np
import pytest
import subjects

import jpeft
from jpeft import MAM, AdapterFusion, Compacter, Houlsby, ParallelAdapter, Pfeiffer, PrefixTuning, UniPELT

KEY = jax.random.key(0)
#: Two layers in float32 against float64, relative to the norm of each array.
GOLDEN = 1e-5
#: A gradient that is the small difference of large terms (a scale before a norm; a key's bias, which a softmax does not
#: see) is rounded at their size: relative to the whole gradient.
ROUNDING = 1e-6
#: Of the losses and the weights of a training, in which every update starts from the last one's rounding.
LOSSES, LEAVES = 1e-5, 1e-4
#: To what part of its start a loss must fall for a training to tell of the updates.
FALLS = 0.95

METHODS: dict[str, Any] = {
    "pfeiffer": Pfeiffer(reduction_factor=4),
    "houlsby": Houlsby(reduction_factor=8),
    "parallel": ParallelAdapter(reduction_factor=4, scaling=3.0),
    "parallel learned": ParallelAdapter(reduction_factor=8, scaling="learned", ln_after=True),
    "norms": Pfeiffer(reduction_factor={"0": 4, "default": 8}, ln_before=True, ln_after=True, scaling="channel"),
    "norm of the sum": Houlsby(reduction_factor=8, ln_after=True, adapter_residual_before_ln=True),
    "residual after": Pfeiffer(reduction_factor=8, residual_before_ln=False, leave_out=[0]),
    "residual post add": Pfeiffer(reduction_factor=8, residual_before_ln="post_add", original_ln_after=False),
    "no norm after": Houlsby(reduction_factor=8, original_ln_after=False),
    "gate": Pfeiffer(reduction_factor=8, gate=True),
    "coupling": Pfeiffer(reduction_factor=8, invertible="nice"),
    "compacter": Compacter(reduction_factor=4),
    "compacter++": Compacter(reduction_factor=4, plus_plus=True, n=2, rank=2),
    "fusion": (Pfeiffer(reduction_factor=4), Pfeiffer(reduction_factor=8, non_linearity="gelu")),
    "static fusion": tuple(Houlsby(reduction_factor=factor) for factor in (8, 16, 8)),
    "fusion of parallel": (ParallelAdapter(reduction_factor=8), ParallelAdapter()),
    "prefix": PrefixTuning(num_tokens=3),
    "prefix by a projection": PrefixTuning(num_tokens=3, projection=True, hidden_size=5),
    "mam": MAM(num_tokens=3, hidden_size=5, reduction_factor=4),
    "unipelt": UniPELT(rank=2, alpha=2, num_tokens=3, hidden_size=5, reduction_factor=4),
}
#: The library's gate is a mean over padding too, so these are compared without.
GATED = ("gate", "unipelt")
CASES = [(family, case) for family in oracle.FAMILIES for case in oracle.cases(family)]
TRAINED = [(family, case) for family, case in CASES if f"{case}/losses" in oracle.golden(family)]


def adapted(base: Any, case: str) -> tuple[Any, str]:
    """The model with the case's method, under the library's names, and the name of the fusion or ""."""
    methods = METHODS[case]
    if not isinstance(methods, tuple):
        return jpeft.adapt(base, methods, key=KEY, name=None if case in oracle.KINDS else "a"), ""
    for name, method in zip("abc", methods, strict=False):
        base = jpeft.adapt(base, method, key=KEY, name=name)
    fusion = AdapterFusion(adapters=tuple("abc"[: len(methods)]), dynamic="static" not in case)
    return jpeft.adapt(base, fusion, key=KEY, name="fusion"), "fusion"


@pytest.mark.parametrize("family, case", CASES, ids=lambda value: value)
def test_outputs_and_gradients_are_those_of_the_library(family, case, monkeypatch):
    if case == "fusion of parallel":
        monkeypatch.setattr(ParallelAdapter, "read", lambda self, h, x, normed: (x, h + x))  # the stream once more
    model, fusion = adapted(oracle.base(family), case)
    model = oracle.filled(model, family, case, fusion)
    padded = case not in GATED
    output, gradients = oracle.run(model, family, padded)
    assert subjects.error(output, oracle.expected(family, case, padded)) < GOLDEN
    assert subjects.error(output, oracle.run(oracle.base(family), family, padded)[0]) > 0.1
    theirs = oracle.leaves(family, case, "grad", fusion)
    whole = np.linalg.norm([np.linalg.norm(part) for path in gradients for _, part in theirs[path]])
    for path, gradient in gradients.items():
        for layer, expected in theirs.pop(path):
            difference = np.linalg.norm(gradient[oracle.region(layer, expected)] - expected)
            assert difference <= GOLDEN * np.linalg.norm(expected) + ROUNDING * whole, path
    assert all("/parts/" in path for path in theirs)


@pytest.mark.parametrize("family, case", TRAINED, ids=lambda value: value)
def test_a_training_is_that_of_the_library(family, case):
    model, fusion = adapted(oracle.base(family), case)
    model = oracle.filled(model, family, case, fusion)
    model = oracle.shrunk(model) if fusion else model
    losses, trained = oracle.train(model, family, case not in GATED)
    expected = oracle.golden(family)[f"{case}/losses"]
    assert expected[-2:].mean() < FALLS * expected[:2].mean()
    np.testing.assert_allclose(losses, expected, rtol=LOSSES)
    errors = oracle.trained_errors(trained, family, case, fusion)
    assert max(errors.values()) < LEAVES, max(errors, key=lambda path: errors[path])


def test_every_case_is_compared():
    assert {case for _, case in CASES} == set(METHODS)


def test_the_gate_does_not_see_padding():
    """Its output at the tokens is that of each row alone; the library's is another."""
    model = oracle.filled(jpeft.adapt(oracle.base("bert"), METHODS["gate"], key=KEY, name="a"), "bert", "gate")
    arrays = oracle.golden("bert")
    whole = model(arrays["ids"], arrays["mask"])
    alone = model(arrays["ids"][:1, :5], arrays["mask"][:1, :5])
    assert subjects.error(whole[0, :5], alone[0]) < subjects.FLOAT32
