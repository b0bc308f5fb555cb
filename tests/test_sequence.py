# SPDX-License-Identifier: Apache-2.0
"""Rows whose tokens a mesh splits: windows, packed rows, padding on either side, and lengths that do not divide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import _scope
from jpeft.models import _attention
from jpeft.models._attention import attention
from jpeft.train.losses import SUMS

#: Loss and gradients in float32 against one device: sums of the same terms in another order.
SAME = 1e-5

MESH = "data=2,sequence=4"
MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "sliding_window": 5,
    "initializer_range": 0.1,
}
METHODS = {
    "lora": jpeft.LoRA(rank=4, targets="all-linear", init="orthogonal"),
    "prefix": jpeft.PrefixTuning(num_tokens=3),
    "prompt": jpeft.PromptTuning(num_tokens=3),
    "loreft": jpeft.LoReFT(rank=2, first=2, last=2),
}
FAST = ("lora", "prompt")
ROWS = 4


@functools.cache
def adapted(name: str, window: int | None):
    base = jpeft.models.build(MISTRAL | {"sliding_window": window}, key=jax.random.key(0))
    return jpeft.adapt(base, METHODS[name], key=jax.random.key(1))


def batch_of(kind: str, seq: int) -> dict[str, np.ndarray]:
    """Rows padded right or left, or two and three examples in each with padding behind."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 96, (ROWS, seq)).astype(np.int32)
    lengths = rng.integers(seq // 2, seq + 1, (ROWS, 1))
    place = np.arange(seq)[None]
    if kind == "packed":
        cuts = rng.integers(3, seq // 2, (ROWS, 1))
        segments = np.where(place < cuts, 1, np.where(place < lengths, 2, 0)).astype(np.int32)
        positions = np.where(segments == 2, place - cuts, place).astype(np.int32)
        labels = np.where(segments > 0, ids, -100)
        return {"input_ids": ids, "segment_ids": segments, "positions": positions, "labels": labels}
    mask = (place < lengths if kind == "right" else place >= seq - lengths).astype(np.int32)
    known = place < (2 if kind == "right" else seq - lengths + 2)  # a prompt, which ReFT acts on
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": np.where(mask & ~known, ids, -100)}


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize("window, seq", [(5, 24), (None, 22)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in METHODS]
)
def test_split_tokens_are_one_devices(name, window, seq, kind):
    """A length of 22 is no multiple of the 4 devices along `sequence`; a window of 5 reaches over their bounds."""
    model, batch, mesh = adapted(name, window), batch_of(kind, seq), jpeft.mesh(MESH)

    def step(model, batch):
        graphdef, trainable, frozen = jpeft.partition(model)

        def loss(trainable, frozen, batch):
            total, count = SUMS["CAUSAL_LM"](jpeft.combine(graphdef, trainable, frozen), batch)
            return total / count

        return jax.jit(jax.value_and_grad(loss))(trainable, frozen, batch)

    want_loss, want = step(model, batch)
    loss, grads = step(jpeft.shard(model, mesh), jpeft.shard_batch(batch, mesh))
    assert abs(float(loss) - float(want_loss)) < SAME
    assert all(np.any(np.asarray(value)) for value in want.values())
    whole = np.sqrt(sum(np.linalg.norm(value) ** 2 for value in want.values()))
    for path, value in want.items():
        assert np.linalg.norm(grads[path] - np.asarray(value)) < SAME * whole, path


def attended(*, causal, window=None, mask=None, segments=None, keys=21, places=False, bias=None, dropout=0.0, cap=None):
    """Output and gradients of one attention of 4 rows of 21 queries, 4 heads over 2, on a mesh or not."""
    rng = np.random.default_rng(3)
    q, g = (rng.standard_normal((ROWS, 21, 4, 6)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((ROWS, keys, 2, 6)).astype(np.float32) for _ in range(2))
    b = None if bias is None else rng.standard_normal((bias, 4, 21, keys)).astype(np.float32)
    told = {"causal": causal, "scale": 0.3, "window": window, "mask": mask, "segment_ids": segments, "cap": cap}
    if places:
        told["places"] = rng.integers(0, 9, (1, 21)).cumsum(1).astype(np.int32)
    if segments is not None and not causal:
        told["key_segments"] = np.sort(rng.integers(1, 4, (ROWS, keys))).astype(np.int32)

    def run(mesh):
        def loss(q, k, v, b):
            with _scope.scope(key=jax.random.key(5)):
                return jnp.sum(attention(q, k, v, bias=b, dropout=dropout, **told) * g)

        here = (q, k, v, b) if mesh is None else (*jpeft.shard_batch((q, k, v), mesh), b)
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2) if b is None else (0, 1, 2, 3)))(*here)

    return run


DRAWN = np.random.default_rng(4).integers
ATTENDED = {
    "causal": {"causal": True},
    "prefix": {"causal": True, "keys": 26},
    "windows of places": {"causal": True, "window": 7, "places": True},
    "window after a prefix": {"causal": True, "window": 4, "keys": 24},
    "packed": {"causal": True, "segments": np.sort(DRAWN(0, 3, (ROWS, 21))).astype(np.int32)},
    "both ways, padded": {"causal": False, "mask": DRAWN(0, 2, (ROWS, 21)).astype(np.int32)},
    "a mask of each query": {"causal": False, "mask": DRAWN(0, 2, (ROWS, 21, 21)).astype(np.int32)},
    "others' keys": {
        "causal": False,
        "keys": 9,
        "segments": np.sort(DRAWN(1, 4, (ROWS, 21))).astype(np.int32),
    },
    "a bias of all": {"causal": False, "bias": 1},
    "a bias of each, capped": {"causal": True, "bias": ROWS, "cap": 1.3},
    "dropout": {"causal": True, "dropout": 0.4},
}


@pytest.mark.parametrize("name", ATTENDED)
def test_every_limit_of_attention_is_one_devices(name, monkeypatch):
    """In blocks of three queries: a device has six, and the last one's end is padding."""
    cuts, in_parts = [], _attention.in_parts
    monkeypatch.setattr(
        _attention, "in_parts", lambda x, ways, *at, **axis: cuts.append(ways) or in_parts(x, ways, *at, **axis)
    )
    run = attended(**ATTENDED[name])
    want_loss, want = run(None)
    assert not cuts
    monkeypatch.setattr(_attention, "BLOCK_ROWS", 3)
    loss, found = run(jpeft.mesh(MESH))
    assert {*cuts} == {4}
    np.testing.assert_allclose(loss, want_loss, rtol=SAME)
    for ours, theirs in zip(found, want, strict=True):
        assert np.any(np.asarray(theirs))
        np.testing.assert_allclose(ours, theirs, atol=SAME)
