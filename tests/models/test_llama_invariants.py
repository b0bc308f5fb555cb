# SPDX-License-Identifier: Apache-2.0
"""What the Llama family keeps: causality, rows apart, packing, scan and remat, dropout, names; and its errors."""

import jax
import numpy as np
import pytest
from flax import nnx
from llama_reference import CONFIGS, QWEN3, SEQ, TINY, assert_close, batch, build, flat, logits_of, run, torch_model

from jpeft._stack import REMAT_POLICIES

KINDS = ["llama", "mistral", "qwen2, windows", "qwen3", "tied"]


@pytest.mark.parametrize("name", KINDS)
def test_a_token_sees_no_later_one(name):
    model = build(CONFIGS[name])
    ids, _ = batch()
    later = ids.copy()
    later[:, 7:] = (later[:, 7:] + 5) % TINY["vocab_size"]
    np.testing.assert_array_equal(logits_of(model, ids)[:, :7], logits_of(model, later)[:, :7])


@pytest.mark.parametrize("name", ["llama", "qwen2, windows"])
def test_no_gradient_reaches_a_later_token(name):
    embeds = np.random.default_rng(0).standard_normal((1, SEQ, TINY["hidden_size"])).astype(np.float32)
    one = np.zeros((1, SEQ, TINY["vocab_size"]), np.float32)
    one[0, 6, 3] = 1
    _, _, seen = run(build(CONFIGS[name]), one, inputs_embeds=embeds)
    assert not np.any(seen[0, 7:])
    assert np.all(np.any(seen[0, 4:7], axis=-1))


@pytest.mark.parametrize("name", KINDS)
def test_a_row_does_not_depend_on_the_others(name):
    model = build(CONFIGS[name])
    ids, mask = batch()
    other, other_mask = ids.copy(), mask.copy()
    other[1:], other_mask[1:] = ids[[0, 0]] + 1, 1
    np.testing.assert_array_equal(logits_of(model, ids, mask)[0], logits_of(model, other, other_mask)[0])


@pytest.mark.parametrize("name", [*KINDS, "rope llama3"])
def test_packed_segments_are_separate_runs(name):
    model = build(CONFIGS[name])
    ids, _ = batch()
    segments = np.array([[1] * 5 + [2] * 8, [3] * 5 + [1] * 8, [1] * 13])
    packed = logits_of(model, ids, segment_ids=segments)
    assert_close(packed[:2, :5], logits_of(model, ids[:2, :5]))
    assert_close(packed[:2, 5:], logits_of(model, ids[:2, 5:]))
    assert_close(packed[2:], logits_of(model, ids[2:]))


@pytest.mark.parametrize("name", ["llama", "qwen2, windows"])
def test_a_scan_is_the_unrolled_loop(name):
    scanned, unrolled = build(CONFIGS[name]), build(CONFIGS[name], unroll=True)
    ids, mask = batch()
    weights = np.random.default_rng(0).standard_normal((3, SEQ, TINY["vocab_size"])).astype(np.float32)
    logits, gradients, _ = run(scanned, weights, input_ids=ids, attention_mask=mask)
    same, same_gradients, _ = run(unrolled, weights, input_ids=ids, attention_mask=mask)
    assert_close(logits, same)
    for path, gradient in gradients.items():
        assert_close(gradient, same_gradients[path], path)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_remat_changes_nothing(remat):
    ids, mask = batch()
    weights = np.random.default_rng(0).standard_normal((3, SEQ, TINY["vocab_size"])).astype(np.float32)
    config = CONFIGS["qwen2, windows"]
    logits, gradients, _ = run(build(config), weights, input_ids=ids, attention_mask=mask)
    same, same_gradients, _ = run(build(config, remat=remat), weights, input_ids=ids, attention_mask=mask)
    assert_close(logits, same)
    for path, gradient in gradients.items():
        assert_close(gradient, same_gradients[path], path)


@pytest.mark.parametrize(("remat", "fewer"), [("full", "names"), ("names", "dots"), ("dots", "none")])
def test_remat_keeps_less(remat, fewer):
    """The bytes that the backward pass of the compiled step is handed, from policy to policy."""

    def kept(policy):
        graphdef, state = nnx.split(build(remat=policy))
        forward = jax.jit(lambda state, ids: jax.vjp(lambda s: nnx.merge(graphdef, s)(ids), state)[1])
        residuals = jax.tree.leaves(jax.eval_shape(forward, state, batch()[0]))
        return sum(leaf.size for leaf in residuals)

    assert kept(remat) < kept(fewer)


def test_dropout_acts_with_a_key_alone():
    model = build(TINY | {"attention_dropout": 0.5})
    ids, mask = batch()
    calm = logits_of(model, ids, mask)
    np.testing.assert_array_equal(calm, logits_of(build(TINY), ids, mask))
    first, again, other = (logits_of(model, ids, mask, key=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - calm).max() > 0.1
    assert np.abs(first - other).max() > 0.1


def test_every_module_has_its_transformers_name():
    model = build(QWEN3)
    theirs = {name for name, _ in torch_model(QWEN3).named_modules()}
    found = model.module_names()
    assert found["layers/self_attn/q_proj"] == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))
    assert {name for names in found.values() for name in names} <= theirs
    owners = {path.rpartition("/")[0] for path in flat(model)}
    assert owners <= set(found)


def test_wrong_calls_are_refused():
    model = build()
    ids, _ = batch()
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=np.zeros((3, SEQ, 24), np.float32))
    with pytest.raises(ValueError, match="a llama model has no token types"):
        model(ids, token_type_ids=np.zeros_like(ids))
    with pytest.raises(ValueError, match="SEQ_CLS gives one output per row"):
        build(task="SEQ_CLS")(ids, segment_ids=np.ones_like(ids))
