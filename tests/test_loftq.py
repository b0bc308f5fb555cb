# SPDX-License-Identifier: Apache-2.0
"""LoftQ: against peft with bitsandbytes, against the algorithm in float64, on stacks of layers with several ranks."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from contracts.models import LLAMA, MODELS
from flax import nnx

import jpeft
from jpeft import _quantized

KEY = jax.random.key(0)
GOLDEN = np.load(Path(__file__).parent / "golden" / "loftq.npz")
IDS = np.arange(8).reshape(2, 4)

#: Singular vectors in float32, of another library; a weight that lies between two codes may be rounded either way.
SVD = 1e-5


def linear(kernel):
    module = nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0))
    module.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))
    return module


def started(kernel, rank, iterations, alpha=None, scheme="nf4", **options):
    method = jpeft.LoRA(rank=rank, alpha=alpha or rank, targets=".*", **options)
    return jpeft.loftq(linear(kernel), method, scheme, iterations, key=KEY, targets=".*")


def product(model, scale=1.0):
    leaves = subjects.leaves(model)
    return scale * leaves["adapters/lora/A"].astype(np.float64) @ leaves["adapters/lora/B"]


@pytest.mark.parametrize("case", range(3))
def test_it_is_pefts(case):
    weight, a, b, base = (GOLDEN[f"{case}/{name}"] for name in ("weight", "A", "B", "base"))
    rank, iterations = int(GOLDEN[f"{case}/rank"]), int(GOLDEN[f"{case}/iterations"])
    model = started(weight.T, rank, iterations)
    assert subjects.error(model.kernel[...].T, base) < SVD
    assert subjects.error(product(model).T, b.astype(np.float64) @ a) < SVD


@pytest.mark.parametrize("scheme", ["nf4", "nf4_double", "fp4", "fp4_double", "int8", "int4_32", "int4_32_asymmetric"])
def test_it_is_the_algorithm_in_float64(scheme):
    weight = np.random.default_rng(0).standard_normal((64, 10))
    low = np.zeros_like(weight)
    for _ in range(3):
        base = np.asarray(_quantized.rounded(jnp.asarray(weight - low, jnp.float32), scheme), np.float64)
        u, s, v = np.linalg.svd(weight - base, full_matrices=False)
        low = (u[:, :4] * s[:4]) @ v[:4]
    model = started(weight, 4, 3, alpha=20, scheme=scheme)
    assert subjects.error(model.kernel[...], base) < SVD
    assert subjects.error(product(model, 5.0), low) < SVD
    a, b = (subjects.leaves(model)[f"adapters/lora/{leaf}"].astype(np.float64) for leaf in "AB")
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-4)  # shared evenly


def test_it_starts_nearer_to_the_float_kernel_than_plain_codes():
    weight = np.random.default_rng(0).standard_normal((64, 48))
    plain = subjects.error(jpeft.quantize(linear(weight), targets=".*").kernel[...], weight)
    errors = [
        subjects.error(started(weight, 8, n).kernel[...] + product(started(weight, 8, n)), weight) for n in (1, 5)
    ]
    assert errors[1] < errors[0] < plain


def test_every_layer_of_a_stack_has_its_own_at_its_own_rank():
    base = jpeft.models.build(LLAMA, "CAUSAL_LM", key=KEY)
    method = jpeft.LoRA(rank=3, alpha=6, targets=["q_proj", "lm_head"], rank_pattern={r".*\.1\.self_attn\.q_proj": 1})
    model = jpeft.loftq(base, method, "nf4", 2, key=KEY)
    leaves, at = subjects.leaves(model), "layers/self_attn/q_proj"
    kernels = model.layers.self_attn.q_proj.kernel[...]
    for layer, (rank, alpha) in enumerate(((3, 6), (1, 6))):
        alone = started(base.layers.self_attn.q_proj.kernel[...][layer], rank, 2, alpha)
        np.testing.assert_array_equal(kernels[layer], alone.kernel[...])
        a, b = (leaves[f"{at}/adapters/lora/{leaf}"][layer].astype(np.float64) for leaf in "AB")
        assert subjects.error(a[:, :rank] @ b[:rank], product(alone)) < SVD
        assert not a[:, rank:].any()
        assert not b[rank:].any()
    assert not leaves["lm_head/adapters/lora/B"].any()  # adapted, and not quantized
    expected = subjects.leaves(jpeft.quantize(base))  # quantized, and not adapted
    np.testing.assert_array_equal(
        leaves["layers/mlp/up_proj/kernel/flat_codes"], expected["layers/mlp/up_proj/kernel/flat_codes"]
    )
    plain = jpeft.adapt(jpeft.quantize(base), method, key=KEY)
    assert jpeft.partition(model)[0] == jpeft.partition(plain)[0]
    merged = jpeft.merge(subjects.fill(model))
    assert subjects.error(merged(IDS), subjects.fill(model)(IDS)) < 10 * subjects.FLOAT32


def test_the_base_is_untouched():
    base = MODELS["llama"].build()
    before = subjects.leaves(base)
    jpeft.loftq(base, jpeft.LoRA(targets=["q_proj"], rank=2), key=KEY)
    assert all((subjects.leaves(base)[path] == value).all() for path, value in before.items())


def test_what_it_cannot_start():
    base = MODELS["llama"].build()
    with pytest.raises(ValueError, match=r"plain factors A and B, of a jpeft\.LoRA .*; got IA3"):
        jpeft.loftq(base, jpeft.IA3(), key=KEY)
    with pytest.raises(ValueError, match=r"plain factors A and B.*A0, B, B0"):
        jpeft.loftq(base, jpeft.LoRA(rank=2, init="pissa"), key=KEY)
    with pytest.raises(ValueError, match=r"plain factors A and B.*with A, B, m, square"):
        jpeft.loftq(base, jpeft.DoRA(rank=2), key=KEY)
    with pytest.raises(ValueError, match="q_proj is 8 x 8, which holds no start of rank 9"):
        jpeft.loftq(base, jpeft.LoRA(rank=9), key=KEY)
    with pytest.raises(ValueError, match="no kernel is both quantized and adapted"):
        jpeft.loftq(base, jpeft.LoRA(rank=2, targets=["lm_head"]), key=KEY)
    with pytest.raises(ValueError, match="iterations"):
        jpeft.loftq(base, jpeft.LoRA(rank=2), iterations=0, key=KEY)
    with pytest.raises(TypeError, match="loftq takes one jpeft method, a LoRA, got Hybrid"):
        jpeft.loftq(base, jpeft.LoRA(rank=2) | jpeft.IA3(), key=KEY)  # type: ignore[arg-type]
