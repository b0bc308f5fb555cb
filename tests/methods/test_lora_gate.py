# SPDX-License-Identifier: Apache-2.0
"""UniPELT's gate on LoRA: a formula in float64, means over text alone, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from contracts.models import BERT, LLAMA
from flax import nnx

import jpeft
from jpeft._scope import scope
from jpeft._stack import scan, stack
from jpeft.models.bert import PRESETS

KEY = jax.random.key(0)


class Heads(nnx.Module):
    """A projection into heads and one out of them, stacked or alone."""

    def __init__(self, rngs):
        self.up = nnx.LinearGeneral(5, (2, 3), rngs=rngs, bias_init=nnx.initializers.normal())
        self.down = nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=rngs, bias_init=nnx.initializers.normal())

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Net(nnx.Module):
    """Two of them."""

    def __init__(self, stacked):
        rngs = nnx.Rngs(0)
        self.layers = stack(Heads, 2, rngs) if stacked else nnx.List([Heads(rngs), Heads(rngs)])

    def __call__(self, x, **running):
        with scope(**running):
            if not isinstance(self.layers, nnx.List):
                return scan(self.layers, lambda layer, x, _: (layer(x), None), x)[0]
            for layer in self.layers:
                x = layer(x)
            return x


TEXT = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], bool)
SEGMENTS = np.array([[0, 0, 0, 0, 0], [1, 1, 2, 2, 2]])


def means(values):
    """The mean over the text of each token's own example, token by token."""
    out = np.zeros(values.shape, values.dtype)
    for row in range(2):
        for i in range(5):
            own = TEXT[row] & (SEGMENTS[row] == SEGMENTS[row, i])
            out[row, i] = values[row, own].sum(0) / max(own.sum(), 1)
    return out


def net64(flat, x, scale, stacked):
    for i in range(2):
        h = x
        for name, shape in (("up", (5, 6)), ("down", (6, 5))):
            path = f"layers/{name}" if stacked else f"layers/{i}/{name}"
            own = {p.removeprefix(f"{path}/"): v[i] if stacked else v for p, v in flat.items() if p.startswith(path)}
            score = h @ own["adapters/lora/gate_weight"] + own["adapters/lora/gate_bias"]
            delta = h @ own["adapters/lora/A"] @ own["adapters/lora/B"]
            y = h @ own["kernel"].reshape(shape) + own["bias"].reshape(-1)
            h = y + scale * means(1 / (1 + np.exp(-score))) * delta
            h = np.tanh(h) if name == "up" else x + h
        x = h
    return x


@pytest.mark.parametrize("stacked", [False, True])
def test_outputs_and_gradients_are_those_of_the_formula(stacked):
    """With alpha unlike the rank: `adapters` leaves alpha / rank out of a gated LoRA."""
    method = jpeft.LoRA(rank=2, alpha=5.0, targets=["up", "down"], gate=True)
    x = np.random.default_rng(1).standard_normal((2, 5, 5))
    weights = np.random.default_rng(2).standard_normal(x.shape)
    with jax.enable_x64(True):
        model = subjects.in_float64(subjects.fill(jpeft.adapt(Net(stacked), method, key=KEY)))
        graphdef, trainable, frozen = jpeft.partition(model)

        def run(trainable):
            model = jpeft.combine(graphdef, trainable, frozen)
            return model(jnp.asarray(x), text=jnp.asarray(TEXT), segments=jnp.asarray(SEGMENTS))

        out = run(trainable)
        gradients = jax.jit(jax.grad(lambda t: (weights * jnp.tanh(run(t))).sum()))(trainable)
        trainable, frozen = subjects.as64(trainable), subjects.as64(frozen)
    expected = lambda t: net64({**frozen, **t}, x, 2.5, stacked)  # noqa: E731
    assert subjects.error(out, expected(trainable)) < subjects.FLOAT64
    slopes = subjects.complex_step(lambda t: (weights * np.tanh(expected(t))).sum(), trainable)
    for path, slope in slopes.items():
        assert subjects.error(gradients[path], slope) < subjects.FLOAT64, path


def test_start_and_count():
    model = jpeft.models.build(BERT, "TOKEN_CLS", key=KEY)
    plain, gated = (
        jpeft.adapt(model, jpeft.LoRA(rank=2, targets=["query"], gate=gate), key=KEY) for gate in (False, True)
    )
    old, new = jpeft.partition(plain)[1], jpeft.partition(gated)[1]
    assert {path.split("/")[-1] for path in new.keys() - old.keys()} == {"gate_weight", "gate_bias"}
    assert all((new[path] == value).all() for path, value in old.items())
    weight = new["layers/attention/self/query/adapters/lora/gate_weight"]
    assert weight.shape == (2, 8, 1)
    assert not new["layers/attention/self/query/adapters/lora/gate_bias"].any()
    assert 0.01 < float(weight.std()) < 0.03
    bert = lambda: jpeft.models.build(PRESETS["bert-base-uncased"], "FEATURE_EXTRACTION", key=KEY)  # noqa: E731
    found = jpeft.summary(nnx.eval_shape(lambda: jpeft.adapt(bert(), jpeft.LoRA(gate=True), key=KEY)))
    assert found.trainable == 294_912 + 24 * 769


def test_what_a_gate_does_not_fit_is_refused(tmp_path):
    bert, llama = (
        jpeft.models.build(config, task, key=KEY) for config, task in ((BERT, "TOKEN_CLS"), (LLAMA, "CAUSAL_LM"))
    )
    with pytest.raises(ValueError, match="word_embeddings is no matrix product of each token"):
        jpeft.adapt(bert, jpeft.LoRA(targets=["word_embeddings"], gate=True), key=KEY)
    with pytest.raises(ValueError, match="would depend on later tokens; it fits bidirectional models and the tasks"):
        jpeft.adapt(llama, jpeft.LoRA(gate=True), key=KEY)
    classifier = jpeft.models.build(LLAMA, "SEQ_CLS", key=KEY)
    assert jpeft.summary(jpeft.adapt(classifier, jpeft.LoRA(gate=True), key=KEY)).trainable
    gated = jpeft.adapt(bert, jpeft.LoRA(gate=True), key=KEY)
    with pytest.raises(ValueError, match="weighs its update by what it reads, so it has no merged form"):
        jpeft.merge(gated)
    with pytest.raises(ValueError, match="PEFT's files hold no gates"):
        jpeft.export_peft(gated, tmp_path / "adapter")


@pytest.mark.untyped
def test_a_gate_is_there_or_not():
    with pytest.raises(ValueError, match=r"LoRA's gate must be one of True, False; got 1\.5"):
        jpeft.LoRA(gate=1.5)
