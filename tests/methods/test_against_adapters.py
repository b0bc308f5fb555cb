# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters, Compacter and AdapterFusion against AdapterHub's library: outputs and gradients, on a padded
batch, with numbers in every leaf. The one difference is by intention: the library's coupling ("nice") on BERT acts
after the norm of the embeddings, jpeft's on the token vectors, so it is compared on Llama."""

from typing import Any

import adapters_oracle as oracle
import jax
import pytest
import subjects

import jpeft
from jpeft import AdapterFusion, Compacter, Houlsby, ParallelAdapter, Pfeiffer

KEY = jax.random.key(0)
#: Two layers in float32 against float64: the outputs have unit size after a norm, the gradients are sums over tokens.
GOLDEN = 1e-5

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
}
CASES = [(family, case) for family in oracle.FAMILIES for case in oracle.cases(family)]


def adapted(base: Any, case: str) -> tuple[Any, str]:
    """The model with the case's method, under the library's names, and the name of the fusion or ""."""
    methods = METHODS[case]
    if not isinstance(methods, tuple):
        return jpeft.adapt(base, methods, key=KEY, name="a"), ""
    for name, method in zip("abc", methods, strict=False):
        base = jpeft.adapt(base, method, key=KEY, name=name)
    fusion = AdapterFusion(adapters=tuple("abc"[: len(methods)]), dynamic="static" not in case)
    return jpeft.adapt(base, fusion, key=KEY, name="fusion"), "fusion"


@pytest.mark.parametrize("family, case", CASES, ids=lambda value: value)
def test_outputs_and_gradients_are_those_of_the_library(family, case):
    model, fusion = adapted(oracle.base(family), case)
    model = oracle.filled(model, family, case, fusion)
    padded = case != "gate"  # the library's gate is a mean over padding too
    output, gradients = oracle.run(model, family, padded)
    assert subjects.error(output, oracle.expected(family, case, padded)) < GOLDEN
    assert subjects.error(output, oracle.run(oracle.base(family), family, padded)[0]) > 0.1
    theirs = oracle.leaves(family, case, "grad", fusion)
    for path, gradient in gradients.items():
        for layer, expected in theirs.pop(path):
            assert subjects.error(gradient[oracle.region(layer, expected)], expected) < GOLDEN, path
    assert all("/parts/" in path for path in theirs)


def test_every_case_is_compared():
    assert {case for _, case in CASES} == set(METHODS)


def test_the_gate_does_not_see_padding():
    """Its output at the tokens is that of each row alone; the library's is another."""
    model = oracle.filled(jpeft.adapt(oracle.base("bert"), METHODS["gate"], key=KEY, name="a"), "bert", "gate")
    arrays = oracle.golden("bert")
    whole = model(arrays["ids"], arrays["mask"])
    alone = model(arrays["ids"][:1, :5], arrays["mask"][:1, :5])
    assert subjects.error(whole[0, :5], alone[0]) < subjects.FLOAT32
