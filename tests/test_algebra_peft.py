# SPDX-License-Identifier: Apache-2.0
"""Combinations of adapters against peft's, where those act on the matrices; and what peft makes of ours."""

import jax
import numpy as np
import peft
import peft_oracle as oracle
import pytest
import subjects
import torch
from flax import nnx

import jpeft

KEY = jax.random.key(0)


@pytest.fixture(scope="module", name="real")
def _real(tmp_path_factory):
    """Two LoRAs on a random BERT in jpeft, and the peft model that holds both."""
    family, folder = "bert", tmp_path_factory.mktemp("adapters")
    method = {"targets": ["query", "intermediate.dense"]}
    ours = []
    for i, rank in enumerate((2, 3)):
        model = jpeft.adapt(oracle.jax_model(family), jpeft.LoRA(rank=rank, alpha=4 + i, **method), key=KEY)
        ours.append(subjects.fill(model, i))
        jpeft.export_peft(ours[-1], str(folder / f"a{i}"))
    base = oracle.torch_model(family)
    with oracle.quiet():
        theirs = peft.PeftModel.from_pretrained(base, folder / "a0", adapter_name="a0")
        theirs.load_adapter(folder / "a1", "a1")
    return ours, theirs


def peft_delta(model, name):
    """Every matrix that a peft adapter changes, `[d_in, d_out]`, by its place."""
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight(name).detach().double().numpy().T
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and name in module.lora_A
    }


def our_delta(model):
    found = {}
    for _, module in nnx.iter_modules(model):
        for adapter in getattr(module, "adapters", {}).values():
            a, b = (np.asarray(leaf[...], np.float64) for leaf in (adapter.A, adapter.B))
            found.update({name: a[i] @ b[i] for i, name in enumerate(adapter.site.names)})
    return found


@pytest.mark.parametrize(
    "how, theirs, options, more",
    [
        ("cat", "cat", {}, {}),
        ("svd", "svd", {"rank": 4}, {"svd_rank": 4}),
        ("ties", "ties_svd", {"rank": 16, "density": 0.3, "over": "matrix"}, {"svd_rank": 16, "density": 0.3}),
        (
            "magnitude_prune",
            "magnitude_prune_svd",
            {"rank": 16, "density": 0.3, "over": "matrix"},
            {"svd_rank": 16, "density": 0.3},
        ),
    ],
)
def test_what_peft_does_with_the_matrices(real, how, theirs, options, more):
    """peft trims each matrix by itself, and takes signs before weights: so over="matrix", and equal weights."""
    ours, model = real
    model.add_weighted_adapter(["a0", "a1"], [0.8, 0.8], how, combination_type=theirs, **more)
    expected = peft_delta(model, how)
    got = our_delta(jpeft.combine_adapters([(ours[0], 0.8), (ours[1], 0.8)], how, **options))
    assert got.keys() == expected.keys()
    for name in expected:
        assert subjects.error(got[name], expected[name]) < 5 * subjects.TORCH, name
    model.delete_adapter(how)


def test_pefts_linear_sums_factors_and_ours_sums_changes(real):
    ours, model = real
    first = peft_delta(model, "a0")
    model.add_weighted_adapter(["a0", "a0"], [1.0, -1.0], "nothing", combination_type="linear")
    got = our_delta(jpeft.combine_adapters([(ours[0], 1.0), (ours[1], -2.0)]))
    expected = {name: value - 2 * peft_delta(model, "a1")[name] for name, value in first.items()}
    for name in expected:
        assert subjects.error(got[name], expected[name]) < subjects.TORCH
    model.delete_adapter("nothing")


def test_a_sum_is_read_by_peft(real, tmp_path):
    ours, model = real
    both = jpeft.combine_adapters([(ours[0], 0.8), (ours[1], -0.3)])
    jpeft.export_peft(both, str(tmp_path / "sum"))
    with oracle.quiet():
        model.load_adapter(tmp_path / "sum", "sum")
    expected, got = peft_delta(model, "sum"), our_delta(both)
    for name in expected:
        assert subjects.error(got[name], expected[name]) < subjects.TORCH
    model.set_adapter("sum")
    with torch.no_grad():
        outputs = oracle.torch_outputs(model, "FEATURE_EXTRACTION").numpy()
    ours_out = jax.jit(lambda *rows: both(*rows))(oracle.IDS, oracle.MASK)
    assert subjects.error(oracle.seen(np.asarray(ours_out)), oracle.seen(outputs)) < 5 * subjects.TORCH
