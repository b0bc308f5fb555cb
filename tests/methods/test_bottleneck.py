# SPDX-License-Identifier: Apache-2.0
"""Houlsby, Pfeiffer, parallel adapters and Compacter: formulas in NumPy, counts by shape, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from flax import nnx

import jpeft
from jpeft import Compacter, Houlsby, ParallelAdapter, Pfeiffer, seams
from jpeft._method import Site
from jpeft._stack import scan, stack
from jpeft.models import bert, llama
from jpeft.models._layer_norm import LayerNorm

KEY = jax.random.key(0)
D = 6
#: Gradients in float64, through two layers with norms.
GRADIENT = 1e-13


class Block(nnx.Module):
    """Two residual joins, the second with a norm."""

    def __init__(self, rngs):
        self.mix = nnx.Linear(D, D, rngs=rngs, bias_init=nnx.initializers.normal())
        self.first = seams.Residual(D, "attention")
        self.wide = nnx.Linear(D, D, rngs=rngs, bias_init=nnx.initializers.normal())
        self.second = seams.Residual(D, "mlp", LayerNorm(D, 1e-3, dtype=jnp.float32))
        self.second.norm.scale[...] += 0.3 * jax.random.normal(rngs(), (D,))
        self.second.norm.bias[...] += 0.3 * jax.random.normal(rngs(), (D,))

    def __call__(self, x):
        x = self.first(jnp.tanh(self.mix(x)), x)
        return self.second(jnp.tanh(self.wide(x)), x)


class Net(nnx.Module):
    """Two blocks, in a list or stacked."""

    def __init__(self, stacked):
        self.input = seams.InputEmbedding(D, "encoder", causal=False)
        rngs = nnx.Rngs(0)
        self.blocks = stack(Block, 2, rngs) if stacked else nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.input(jnp.asarray(x), None, None, None)[0]
        if isinstance(self.blocks, nnx.List):
            for block in self.blocks:
                x = block(x)
            return x
        return scan(self.blocks, lambda block, x, _: (block(x), None), x)[0]


def net64(flat, x, method, stacked, *, name):
    """The network with adapters in NumPy, from its leaves in float64."""
    leaves = lambda path: {p.removeprefix(path + "/"): v for p, v in flat.items() if p.startswith(path + "/")}  # noqa: E731
    if method.invertible:
        x = coupled64(leaves(f"input/adapters/{name}"), x)
    for i in range(2):
        block = {p: v[i] for p, v in leaves("blocks").items()} if stacked else leaves(f"blocks/{i}")
        for linear, join in (("mix", "first"), ("wide", "second")):
            h = np.tanh(x @ block[f"{linear}/kernel"] + block[f"{linear}/bias"])
            own = {p.rpartition("/")[2]: v for p, v in block.items() if p.startswith(f"{join}/adapters/")}
            norm = (lambda y: y) if join == "first" else lambda y, b=block: norm64(y, *_norm(b), 1e-3)
            x = joined64(method, own, i, norm, h, x, flat.get(f"adapters/{name}/rule"))
    return x


def _norm(block):
    return block["second/norm/scale"], block["second/norm/bias"]


def joined64(method, own, layer, norm, h, x, rule):
    """norm(r + u + x)."""
    if not own or layer in method.leave_out:
        return norm(h + x)
    z = x if method.PARALLEL else norm(h + x) if method.original_ln_before else h
    read = norm64(z, own["before_scale"], own["before_bias"], 1e-5) if method.ln_before else z
    if rule is not None:
        for part in ("down", "up"):
            products = [
                np.kron(s, a @ b) for s, a, b in zip(rule, own[part + "_left"], own[part + "_right"], strict=True)
            ]
            own[part] = sum(products)
    m = {0: 3, 1: 2}[layer] if isinstance(method.reduction_factor, dict) else own["down"].shape[1]
    hidden = read @ own["down"][:, :m] + own["down_bias"][:m]
    hidden = hidden / (1 + np.exp(-hidden)) if method.non_linearity == "swish" else np.tanh(hidden)
    u = (hidden @ own["up"][:m] + own["up_bias"]) * own.get("scale", method.scaling)
    if method.gate:
        u = u * np.mean(1 / (1 + np.exp(-(z @ own["gate_weight"] + own["gate_bias"]))), axis=1, keepdims=True)
    return norm(u + h + x)


def norm64(x, scale, bias, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale + bias


def coupled64(own, x):
    a, b = x[..., : D // 2], x[..., D // 2 :]
    net = lambda n, x: np.tanh(x @ own[n + "_down"] + own[n + "_down_bias"]) @ own[n + "_up"] + own[n + "_up_bias"]  # noqa: E731
    a = a + net("F", b)
    return np.concatenate([a, b + net("G", a)], -1)


METHODS = {
    "houlsby": Houlsby(reduction_factor=2, scaling=0.7),
    "pfeiffer": Pfeiffer(reduction_factor={0: 2, 1: 3}, non_linearity="tanh", ln_before=True, invertible="nice"),
    "pfeiffer with a gate": Pfeiffer(reduction_factor=2, non_linearity="swish", gate=True, blocks="attention"),
    "parallel": ParallelAdapter(reduction_factor=1.5, non_linearity="swish", scaling="channel", leave_out=0),
    "compacter": Compacter(reduction_factor=1.5, non_linearity="tanh", n=2, scaling="learned"),
}


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "listed"])
@pytest.mark.parametrize("name", METHODS)
def test_the_formula_in_numpy(name, stacked):
    method = METHODS[name]
    filled = subjects.fill(jpeft.adapt(Net(stacked), method, key=KEY))
    with jax.enable_x64(True):
        model = subjects.in_float64(filled)
        x = np.random.default_rng(0).standard_normal((2, 3, D))
        weights = np.random.default_rng(1).standard_normal(x.shape)
        graphdef, trainable, frozen = jpeft.partition(model)
        run = jax.jit(lambda t: jpeft.combine(graphdef, t, frozen)(x))
        base, own = subjects.as64(frozen), subjects.as64(trainable)
        formula = lambda own: net64({**base, **own}, x, method, stacked, name=method.kind)  # noqa: E731
        assert subjects.error(run(trainable), formula(own)) < subjects.FLOAT64
        gradients = jax.grad(lambda t: (weights * run(t)).sum())(trainable)
        for path, expected in subjects.complex_step(lambda own: (weights * formula(own)).sum(), own).items():
            assert np.abs(gradients[path] - expected).max() < GRADIENT * max(1, np.abs(expected).max()), path


def test_a_layer_left_out_is_the_base_bit_for_bit_and_padding_is_not_trained():
    method = Pfeiffer(reduction_factor={0: 2, 1: 3}, leave_out=[0])
    model = subjects.fill(jpeft.adapt(Net(stacked=True), method, key=KEY))
    graphdef, trainable, frozen = jpeft.partition(model)
    x = np.random.default_rng(0).standard_normal((2, 3, D)).astype(np.float32)

    def first(model):
        return scan(model.blocks, lambda block, x, _: (x, block(x)), x)[1][0]

    np.testing.assert_array_equal(jax.jit(first)(model), jax.jit(first)(jpeft.strip(model)))
    both = subjects.fill(jpeft.adapt(Net(stacked=True), Pfeiffer(reduction_factor={0: 2, 1: 3}), key=KEY))
    graphdef, trainable, frozen = jpeft.partition(both)
    gradients = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(x) ** 2).sum())(trainable)
    at = "blocks/second/adapters/pfeiffer/"
    assert trainable[at + "down"].shape == (2, D, 3)
    assert not gradients[at + "down"][1, :, 2:].any()
    assert not gradients[at + "up"][1, 2:].any()
    assert not gradients[at + "down_bias"][1, 2:].any()
    assert gradients[at + "down"][0].any()


def test_a_stack_of_somebody_elses_knows_its_layers():
    """Run by `jax.lax.scan` over the whole module, with another width and dropout in each layer."""

    class Foreign(nnx.Module):
        def __init__(self):
            self.blocks = nnx.vmap(Block)(nnx.Rngs(0).split(2))

        def __call__(self, x):
            return jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)[0]

    method = Pfeiffer(reduction_factor={0: 2, 1: 3}, leave_out=[1])
    model = subjects.fill(jpeft.adapt(Foreign(), method, key=KEY))
    x = np.random.default_rng(0).standard_normal((2, 3, D)).astype(np.float32)
    assert jpeft.summary(model).trainable == 2 * D * 3 + 3 + D
    assert np.isfinite(model(x)).all()


def counted(config, method, task="FEATURE_EXTRACTION"):
    """(trainable parameters, those of matrices alone) by shape."""
    model = nnx.eval_shape(lambda: jpeft.adapt(jpeft.models.build(config, task, key=KEY), method, key=KEY))
    adapters = [a for _, module in nnx.iter_modules(model) for a in getattr(module, "adapters", {}).values()]
    assert method.leave_out or jpeft.summary(model).trainable == sum(
        leaf.size for leaf in jpeft.partition(model)[1].values()
    )
    return jpeft.summary(model).trainable, sum(a.method.weights(a.site) for a in adapters)


BASE = bert.PRESETS["bert-base-uncased"]
LLAMA_7B = llama.Config(
    vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    intermediate_size=11008,
)  # fmt: skip
COUNTS = [
    (Pfeiffer(), BASE, 894_528, 884_736),
    (Houlsby(), BASE, 1_789_056, 1_769_472),
    (ParallelAdapter(), BASE, 7_091_712, 7_077_888),
    (ParallelAdapter(scaling="learned"), BASE, 7_091_724, 7_077_888),
    (Pfeiffer(invertible="nice"), BASE, 1_190_592, 884_736),
    (Pfeiffer(reduction_factor=96, scaling="channel"), BASE, 165_984, 147_456),
    (Pfeiffer(reduction_factor=1000), BASE, 12 * (2 * 768 + 1 + 768), 12 * 2 * 768),
    (Compacter(), BASE, 57_088, 38_016),
    (Compacter(plus_plus=True), BASE, 28_576, 19_008),
    (Houlsby(reduction_factor=64), LLAMA_7B, 33_820_672, 33_554_432),
    (Pfeiffer(leave_out=[11]), BASE, 894_528 * 11 // 12, 884_736 * 11 // 12),
]


@pytest.mark.parametrize("method, config, trainable, weights", COUNTS, ids=lambda value: str(value)[:40])
def test_counts(method, config, trainable, weights):
    assert counted(config, method) == (trainable, weights)


WRONG = [
    (Houlsby, {"reduction_factor": 0}, "Houlsby's reduction_factor must be a positive number .*, got 0"),
    (Houlsby, {"reduction_factor": {"a": 2}}, "takes indices of layers and 'default', got 'a'"),
    (Houlsby, {"reduction_factor": {0: -1}}, "must be a positive number, got -1"),
    (Pfeiffer, {"non_linearity": "rely"}, "Pfeiffer's non_linearity must be one of relu, .*; got 'rely'"),
    (Pfeiffer, {"scaling": 0}, "scaling must be a positive number or 'learned' or 'channel', got 0"),
    (Pfeiffer, {"scaling": "free"}, "got 'free'"),
    (Pfeiffer, {"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
    (Pfeiffer, {"init": "zero"}, "init must be one of bert, mam, houlsby; got 'zero'"),
    (Pfeiffer, {"blocks": ("ffn",)}, "blocks must be one of attention, cross_attention, mlp; got 'ffn'"),
    (Pfeiffer, {"blocks": ()}, "blocks is empty"),
    (Pfeiffer, {"gate": "yes"}, "gate must be one of True, False; got 'yes'"),
    (Pfeiffer, {"invertible": "glow"}, "invertible must be one of None, nice; got 'glow'"),
    (Pfeiffer, {"invertible_reduction_factor": 0}, "invertible_reduction_factor must be a positive number, got 0"),
    (Pfeiffer, {"residual_before_ln": "after"}, "residual_before_ln must be one of True, False, post_add"),
    (Houlsby, {"residual_before_ln": False}, "needs original_ln_before=True"),
    (Houlsby, {"adapter_residual_before_ln": True}, "needs an adapter with ln_after=True"),
    (ParallelAdapter, {"original_ln_before": True}, "reads the stream itself"),
    (Pfeiffer, {"layers": [-1]}, "layers takes the indices of layers"),
    (Compacter, {"n": 0}, "Compacter's n must be a whole number of at least 1, got 0"),
    (Compacter, {"rank": 1.0}, "rank must be a whole number of at least 1, got 1.0"),
    (Compacter, {"rule_std": 0}, "rule_std must be a positive number, got 0"),
    (Compacter, {"reduction_factor": {0: 2}}, "one reduction_factor for all layers"),
    (Compacter, {"init": "bert"}, "init must be one of xavier; got 'bert'"),
]


@pytest.mark.parametrize("make, fields, message", WRONG, ids=lambda value: str(value)[:40])
@pytest.mark.untyped
def test_a_wrong_field_is_an_error(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


REFUSED = [
    (Pfeiffer(leave_out=[2]), r"leave_out=\[2\]: the targets stand in layers \[0, 1\], not in \[2\]"),
    (Pfeiffer(layers=[5]), r"layers=\[5\]: the targets stand in layers \[0, 1\]"),
    (Pfeiffer(leave_out=[0, 1]), "is not left out again"),
    (Pfeiffer(cross=True), r"of a block cross_attention, and the model has none \(only of attention, mlp\)"),
    (Pfeiffer(reduction_factor={0: 2}), "reduction_factor has no entry for layer 1"),
    (Pfeiffer(reduction_factor={7: 2, "default": 3}), "reduction_factor names layer 7, and the adapter stands in none"),
    (Compacter(reduction_factor=2, n=2), "Compacter's n must divide the widths .* they are 6 and 3, and n is 2"),
]


@pytest.mark.parametrize("method, message", REFUSED, ids=lambda value: str(value)[:60])
def test_what_does_not_fit_the_model_is_refused(method, message):
    with pytest.raises(ValueError, match=message):
        jpeft.adapt(Net(stacked=True), method, key=KEY)


def test_what_a_causal_or_tied_model_cannot_have_is_refused():
    tiny = llama.Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                        intermediate_size=8, tie_word_embeddings=True)  # fmt: skip
    model = jpeft.models.build(tiny, "CAUSAL_LM", key=KEY)
    with pytest.raises(ValueError, match="inverted before a head that is tied to the embedding"):
        jpeft.adapt(model, Pfeiffer(invertible="nice"), key=KEY)
    with pytest.raises(ValueError, match="outputs of a causal model would depend on later tokens"):
        jpeft.adapt(model, Pfeiffer(gate=True), key=KEY)


def test_a_method_that_changes_what_it_reads_cannot_be_merged():
    with pytest.raises(ValueError, match="Pfeiffer computes what no weights of the base can"):
        jpeft.merge(jpeft.adapt(Net(stacked=False), Pfeiffer(reduction_factor=2), key=KEY))


STARTS = [
    ("bert", lambda down, up: (abs(down.std() - 0.02) < 1e-3, abs(up.std() - 0.02) < 1e-3)),
    ("mam", lambda down, up: (abs(np.abs(down).max() - 64**-0.5) < 1e-3, not up.any())),
    ("houlsby", lambda down, up: (0.019 < np.abs(down).max() <= 0.02, 0.019 < np.abs(up).max() <= 0.02)),
]


@pytest.mark.parametrize("init, holds", STARTS, ids=lambda value: str(value)[:8])
def test_starts(init, holds):
    site = Site("a", ("a",), (True,), d_in=64, d_out=64, seam="residual")
    start = Houlsby(reduction_factor=2, init=init).start(site, None, KEY)
    leaves = {name: np.asarray(value) for name, value in start.trainable.items()}
    assert all(holds(leaves["down"], leaves["up"]))
    assert not leaves["down_bias"].any()
    assert not leaves["up_bias"].any()
