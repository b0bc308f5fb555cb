# SPDX-License-Identifier: Apache-2.0
"""What an adapted model computes: the base at its start and without its adapters, and the same when merged."""

import contextlib
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import subjects
from contracts.table import FIRST, IDS
from flax import nnx

import jpeft
from jpeft import seams
from jpeft._graft import is_grafted, sharing
from jpeft._stack import scan

#: One merged projection against the unmerged: roundings of the kernel and of the output, in the base's dtype.
MERGED = {jnp.float32: subjects.MERGED, jnp.bfloat16: float(jnp.finfo(jnp.bfloat16).eps)}


def test_it_starts_as_the_base(case):
    """Or does not: a random prompt is something else from the first step on."""
    start, base = case.run(case.fresh(), IDS), case.run(case.base, IDS)
    assert np.array_equal(start, base) == case.line.identity


def test_filled_it_is_another(case):
    """The other contracts would hold of a method that does nothing."""
    assert subjects.error(case.run(case.filled, IDS), case.run(case.base, IDS)) > 0.05


def test_frozen_is_the_base_bit_for_bit(case):
    """Leaf for leaf, but for the constants of adapters."""
    frozen, expected = jpeft.partition(case.filled)[2], jpeft.partition(case.base)[2]
    own = {path: value for path, value in frozen.items() if "adapters" not in path.split("/")}
    assert list(own) == list(expected)
    for path, value in expected.items():
        assert own[path].dtype == value.dtype
        np.testing.assert_array_equal(own[path], value)


def test_without_its_adapters_it_is_the_base_bit_for_bit(case):
    stripped = jpeft.strip(case.filled)
    assert nnx.graphdef(stripped) == nnx.graphdef(case.base)
    np.testing.assert_array_equal(case.run(stripped, IDS), case.run(case.base, IDS))


@pytest.mark.parametrize("dtype", MERGED, ids=lambda dtype: dtype.__name__)
def test_merged_every_module_is_the_same(case, dtype):
    """Each adapted module by itself, in every layer of its stack."""
    if not case.line.merges:
        return
    adapted = subjects.cast(case.filled, dtype)
    merged = jpeft.merge(adapted)
    assert {leaf.dtype for leaf in jpeft.partition(merged)[2].values()} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jpeft.partition(adapted)[1].values()} == {jnp.dtype(jnp.float32)}
    plain = dict(nnx.iter_modules(merged))
    sites = [(path, module) for path, module in nnx.iter_modules(adapted) if getattr(module, "adapters", ())]
    assert sites
    for path, module in (site for site in sites if seams.kind(site[1]) == "projection"):
        (adapter, *_) = module.adapters.values()
        x = _inputs(module, dtype)
        with sharing(adapted) if is_grafted(adapted) else contextlib.nullcontext():
            if adapter.site.lead:
                got, expected = (scan(m, lambda m, x, _: (x, m(x)), x)[1] for m in (plain[path], module))
            else:
                got, expected = plain[path](x), module(x)
        assert got.dtype == expected.dtype
        assert subjects.error(got, expected) < MERGED[dtype], path


def _inputs(module, dtype):
    rng = np.random.default_rng(1)
    if isinstance(module, nnx.Embed):
        return rng.integers(0, module.num_embeddings, (20,))
    features = module.in_features if isinstance(module.in_features, tuple) else (module.in_features,)
    return jnp.asarray(rng.standard_normal((20, *features)), dtype)


def test_merged_it_is_the_same(case):
    model = case.filled
    if not case.line.merges:
        with pytest.raises(ValueError, match="has no merged form"):
            jpeft.merge(model)
        return
    merged = jpeft.merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(jpeft.dequantize(case.base))
    assert subjects.error(case.run(merged, IDS), case.run(model, IDS)) < subjects.FLOAT32  # roundings of all layers


def test_saved_leaves_do_the_same_in_another_process(tmp_path):
    """One process loads every method's trainable leaves into a base of its own making, adapted with another key.

    With them go the leaves of adapters that were taken over, which were trained before.
    """
    for i, case in enumerate(FIRST):
        _, trainable, frozen = jpeft.partition(case.filled)
        taken_over = {path: value for path, value in frozen.items() if "/parts/" in path}
        saved = {path: np.asarray(value) for path, value in {**trainable, **taken_over}.items()}
        safetensors.numpy.save_file(saved, tmp_path / f"{i}.safetensors")
        np.save(tmp_path / f"{i}.npy", case.run(case.filled, IDS))
    here = Path(__file__).parent
    command = [sys.executable, str(here / "load_elsewhere.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["same"] * len(FIRST)
