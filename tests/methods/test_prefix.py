# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning against peft and NumPy: its layout, positions, gate, packed rows and windows, its fold and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_oracle
import pytest
import subjects
import virtual_oracle
from contracts.models import BERT, LLAMA, MODELS
from contracts.table import IDS
from flax import nnx
from virtual_oracle import run

import jpeft
from jpeft import seams
from jpeft._scope import scope

KEY = jax.random.key(0)
#: What peft must be told for the text to stand where it does without a prefix: it adds the prefix's length.
UNMOVED = np.tile(np.arange(8) - 3, (3, 1))


def adapted(model, **options):
    return subjects.fill(jpeft.adapt(model, jpeft.PrefixTuning(**{"num_tokens": 3, **options}), key=KEY))


def real(family, **options):
    return peft.PrefixTuningConfig(task_type=peft_oracle.FAMILIES[family][1], num_virtual_tokens=3, **options)


@pytest.mark.parametrize("family", ["bert cls", "bert tokens", "llama", "llama cls", "qwen3"])
def test_outputs_and_gradients_are_those_of_peft(family):
    """With shifted positions as they come out of peft; by default as when peft is told the text's own."""
    moved = jpeft.PrefixTuning(num_tokens=3, shift_positions=True)
    virtual_oracle.compare(family, moved, real(family), virtual_oracle.prefix_names(family))
    virtual_oracle.compare(
        family, jpeft.PrefixTuning(num_tokens=3), real(family), virtual_oracle.prefix_names(family), UNMOVED
    )


@pytest.mark.parametrize("family, hidden", [("bert cls", 5), ("llama", 7), ("llama tied", None)])
def test_a_projection_is_that_of_peft(family, hidden):
    """Its width is that of the keys, all heads together, also where those are fewer than the queries'."""
    options = {} if hidden is None else {"encoder_hidden_size": hidden}
    method = jpeft.PrefixTuning(num_tokens=3, projection=True, hidden_size=hidden, shift_positions=True)
    virtual_oracle.compare(
        family, method, real(family, prefix_projection=True, **options), virtual_oracle.projected_names()
    )


def test_a_window_hides_no_prefix_where_peft_counts_it_as_past_tokens():
    """In peft the window of a sliding attention slides off the prefix; up to its length both are the same."""
    config, names = real("mistral"), virtual_oracle.prefix_names("mistral")
    method = jpeft.PrefixTuning(num_tokens=3, shift_positions=True)
    with pytest.raises(AssertionError):
        virtual_oracle.compare("mistral", method, config, names)
    model = adapted(peft_oracle.jax_model("mistral"))
    wide = nnx.clone(model)
    wide.config = type(wide.config)(**{**vars(wide.config), "sliding_window": None})
    outputs, expected = run(model, peft_oracle.IDS[2:]), run(wide, peft_oracle.IDS[2:])
    assert subjects.error(outputs[:, :5], expected[:, :5]) < subjects.FLOAT32
    table = jpeft.partition(model)[1]["adapters/prefix_tuning/prefix"]

    def last(prefix):
        graphdef, trainable, frozen = jpeft.partition(model)
        given = trainable | {"adapters/prefix_tuning/prefix": prefix}
        return jpeft.combine(graphdef, given, frozen)(peft_oracle.IDS[2:])[0, -1].sum()

    assert (jax.jit(jax.grad(last))(table)[:, -2:] != 0).all()


@pytest.mark.parametrize("projection", [False, True])
def test_outputs_and_gradients_are_the_formula(projection):
    """On the causal foreign model, whose stack jpeft does not run itself."""
    with jax.enable_x64(True):
        model = subjects.in_float64(adapted(MODELS["foreign"].build(), projection=projection))
        graphdef, trainable, frozen = jpeft.partition(model)
        base = subjects.as64({p: v for p, v in frozen.items() if "adapters" not in p})
        at = "adapters/prefix_tuning/"

        def formula(leaves):
            if not projection:
                return virtual_oracle.foreign64(base, IDS, prefix=leaves[f"{at}prefix"])
            h = np.tanh(leaves[f"{at}embedding"] @ leaves[f"{at}down_kernel"] + leaves[f"{at}down_bias"])
            table = (h @ leaves[f"{at}up_kernel"] + leaves[f"{at}up_bias"]).reshape(3, 4, 2, 4)
            return virtual_oracle.foreign64(base, IDS, prefix=table)

        leaves = subjects.as64(trainable)
        assert subjects.error(run(model, IDS), formula(leaves)) < subjects.FLOAT64
        gradient = jax.jit(jax.grad(lambda t: jnp.sin(jpeft.combine(graphdef, t, frozen)(IDS)).sum()))(trainable)
        expected = subjects.complex_step(lambda t: np.sin(formula(t)).sum(), leaves)
        assert all(subjects.error(gradient[path], expected[path]) < 1e-12 for path in leaves)


class Listed(nnx.Module):
    """The foreign model's attention in an `nnx.List`, outside of any stack."""

    def __init__(self, rngs):
        self.blocks = nnx.List([seams.KeyValues(8, 2, 4) for _ in range(3)])
        self.embed = nnx.Embed(11, 8, rngs=rngs)

    def __call__(self, ids, mask=None):
        x = self.embed(ids).reshape(*ids.shape, 2, 4)
        return [block(x, x, mask, self.embed(ids)) for block in self.blocks]


def test_every_layer_of_a_list_reads_its_own_rows_of_the_table():
    """K at 2l and V at 2l + 1, of the adapted layers alone."""
    model = adapted(Listed(nnx.Rngs(0)), layers=[0, 2])
    table = np.asarray(model.adapters["prefix_tuning"].prefix[...])
    assert table.shape == (3, 4, 2, 4)
    outputs = model(IDS, np.ones_like(IDS))
    for (k, v, mask), row in zip((outputs[0], outputs[2]), (0, 1), strict=True):
        np.testing.assert_array_equal(k[:, :3], np.broadcast_to(table[:, 2 * row], (3, 3, 2, 4)))
        np.testing.assert_array_equal(v[:, :3], np.broadcast_to(table[:, 2 * row + 1], (3, 3, 2, 4)))
        assert mask.shape == (3, 9)
        assert (mask == 1).all()
    assert outputs[1][0].shape == (3, 6, 2, 4)
    assert all(mask is None for *_, mask in model(IDS))


@pytest.mark.parametrize("name", ["foreign", "bert", "llama"])
def test_a_layer_that_is_not_adapted_is_the_bases(name):
    """By a prefix in the first layer alone, of values like in all, nothing but that one's attention changes."""
    base = MODELS[name].build()
    if name == "foreign":
        model = adapted(base, layers=[1])
        prefix = np.asarray(model.adapters["prefix_tuning"].prefix[...], np.float64)
        flat = subjects.as64(jpeft.partition(base)[2])
        bare = virtual_oracle.foreign64(flat, IDS)
        assert subjects.error(run(base, IDS), bare) < subjects.FLOAT32
        expected = virtual_oracle.foreign64(flat, IDS, prefix=prefix, layers=(1,))
        assert subjects.error(run(model, IDS), expected) < subjects.FLOAT32
        return
    one, other = (adapted(base, layers=[1], modules_to_save=()) for _ in range(2))
    graphdef, trainable, frozen = jpeft.partition(other)
    (path,) = trainable
    elsewhere = trainable[path].at[:, :2].add(1.0)
    np.testing.assert_array_equal(run(jpeft.combine(graphdef, {path: elsewhere}, frozen), IDS), run(one, IDS))
    assert jpeft.summary(one).trainable == 3 * 2 * (8 if name == "bert" else 4)


@pytest.mark.parametrize("config, task", [(BERT, "TOKEN_CLS"), (LLAMA, "CAUSAL_LM")], ids=["bert", "llama"])
def test_one_prefix_serves_a_packed_row(config, task):
    model = adapted(_build(config, task))
    ids = np.random.default_rng(0).integers(1, 11, (1, 9))
    segments = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    packed = run(model, ids, segment_ids=segments)
    for segment in range(3):
        own = segments[0] == segment
        assert subjects.error(packed[0][own], run(model, ids[:, own])[0]) < subjects.FLOAT32


def _build(config, task):
    return jpeft.models.build(config, task, key=KEY)


# The gate.


def test_the_gate_scales_each_examples_prefix():
    """K and V times the mean over its real tokens of sigmoid(x · w + b), whatever stands at padding."""
    model = adapted(Listed(nnx.Rngs(0)), gate=True)
    leaves = {p: np.asarray(v, np.float64) for p, v in jpeft.partition(model)[1].items()}
    x = np.asarray(model.embed.embedding[...], np.float64)[IDS]
    text = np.array([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    table = leaves["adapters/prefix_tuning/prefix"]
    with scope(text=jnp.asarray(text, bool)):
        outputs = model(IDS)
    for i, (k, v, _) in enumerate(outputs):
        at = f"blocks/{i}/adapters/prefix_tuning/gate_"
        g = 1 / (1 + np.exp(-(x @ leaves[f"{at}weight"] + leaves[f"{at}bias"])))[..., 0]
        g = ((g * text).sum(1) / text.sum(1))[:, None, None, None]
        for y, row in ((k, 2 * i), (v, 2 * i + 1)):
            assert subjects.error(y[:, :3], g * table[None, :, row]) < subjects.FLOAT32


def test_the_gate_of_a_causal_language_model_is_refused():
    with pytest.raises(ValueError, match="outputs of a causal model would depend on later tokens"):
        adapted(_build(LLAMA, "CAUSAL_LM"), gate=True)
    assert np.isfinite(run(adapted(_build(LLAMA | {"pad_token_id": 0}, "SEQ_CLS"), gate=True), IDS)).all()


# Starts, fold, counts, refusals.


@pytest.mark.parametrize("projection", [False, True])
def test_the_starts(projection):
    base = _build(LLAMA | {"hidden_size": 64}, "CAUSAL_LM")

    def start(init):
        hidden = 50 if projection else None
        method = jpeft.PrefixTuning(num_tokens=40, projection=projection, init=init, hidden_size=hidden)
        return jpeft.adapt(base, method, key=KEY)

    leaves = {p.split("/")[-1]: np.asarray(v) for p, v in jpeft.partition(start("normal"))[1].items()}
    assert abs(leaves["embedding" if projection else "prefix"].std() - 1) < 0.05
    for name, fan in (("down", 32), ("up", 50)) if projection else ():
        for leaf in (leaves[f"{name}_kernel"], leaves[f"{name}_bias"]):
            assert 0.8 * fan**-0.5 < np.abs(leaf).max() < fan**-0.5
    table = jpeft.partition(jpeft.fold(start("zero")))[1]["adapters/prefix_tuning/prefix"]
    assert table.shape == (40, 4, 2, 16)
    assert not table.any()


@pytest.mark.parametrize("name, gate", [("foreign", False), ("bert", True), ("llama", False)])
def test_folded_it_has_no_projection_and_the_same_outputs(name, gate):
    options = {"projection": True, "hidden_size": 5, "shift_positions": True, "layers": [1], "gate": gate}
    base = MODELS[name].build()
    model = adapted(base, **options)
    folded = jpeft.fold(model)
    assert subjects.error(run(folded, IDS), run(model, IDS)) < subjects.FLOAT32
    simple = jpeft.PrefixTuning(num_tokens=3, **options | {"projection": False, "hidden_size": None})
    assert jpeft.summary(folded).rows[0].method == simple
    assert jpeft.partition(folded)[0] == jpeft.partition(jpeft.adapt(base, simple, key=KEY))[0]


COUNTS = [
    ("bert-base-uncased", {"num_tokens": 20, "projection": True, "hidden_size": 768}, 14_780_160, 2 * 24 * 768 * 10),
    ("bert-base-uncased", {"num_tokens": 30, "projection": True, "hidden_size": 512}, 9_872_384, 552_960),
    ("llama-2-7b", {"num_tokens": 20}, 5_242_880, 5_242_880),
]


@pytest.mark.parametrize("preset, options, trained, folded", COUNTS)
def test_counts(preset, options, trained, folded):
    config, task = virtual_oracle.SHAPES[preset]
    head = 2_307 if task == "SEQ_CLS" else 0

    def build():
        return jpeft.adapt(_build(config, task), jpeft.PrefixTuning(**options), key=KEY)

    for make, count in ((build, trained), (lambda: jpeft.fold(build()), folded)):
        model = virtual_oracle.shapes(make)
        (row,) = jpeft.summary(model).rows
        assert row.trainable == count + head == sum(np.prod(v.shape) for v in jpeft.partition(model)[1].values())
        assert row.changed == head


def test_a_gate_counts():
    model = adapted(_build(BERT, "TOKEN_CLS"), gate=True, modules_to_save=(), layers=[0])
    assert jpeft.summary(model).trainable == 3 * 2 * 8 + 9


WRONG = [
    ({"num_tokens": 0}, "PrefixTuning's num_tokens must be a whole number of at least 1, got 0"),
    ({"hidden_size": 4}, "PrefixTuning's hidden_size is of the projection; pass projection=True"),
    ({"hidden_size": 0, "projection": True}, "PrefixTuning's hidden_size must be a whole number of at least 1, got 0"),
    ({"init": "text"}, "PrefixTuning's init must be one of normal, zero; got 'text'"),
    ({"gate": "yes"}, "PrefixTuning's gate must be one of True, False; got 'yes'"),
    ({"blocks": "encoder"}, "PrefixTuning's blocks must be one of attention, cross_attention; got 'encoder'"),
    ({"layers": [-1]}, r"layers takes the indices of layers, counted from 0, got \[-1\]"),
]


@pytest.mark.untyped
@pytest.mark.parametrize("options, message", WRONG, ids=lambda value: str(value)[:40])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.PrefixTuning(**options)


def test_wrong_models_are_refused():
    with pytest.raises(ValueError, match=r"of a block cross_attention, and the model has none \(only of attention\)"):
        adapted(MODELS["foreign"].build(), blocks="cross_attention")
    with pytest.raises(ValueError, match=r"layers=\[2\]: the targets stand in layers \[0, 1\], not in \[2\]"):
        adapted(MODELS["llama"].build(), layers=[2])
    odd = Listed(nnx.Rngs(0))
    odd.blocks[1] = seams.KeyValues(8, 1, 4)
    with pytest.raises(ValueError, match=r"blocks/0 and blocks/1 and blocks/2 differ in size, so one table cannot"):
        adapted(odd)
    bert = adapted(_build(BERT, "TOKEN_CLS"), num_tokens=11, shift_positions=True)
    with pytest.raises(ValueError, match=r"6 tokens behind 11 virtual ones are more than the 16 positions"):
        bert(IDS)
