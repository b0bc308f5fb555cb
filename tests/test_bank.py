# SPDX-License-Identifier: Apache-2.0
"""Many adapters of one base: every row of a mixed batch is what its adapter alone gives, and passes it its gradient."""

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from contracts.models import BERT, LLAMA, VOCAB
from contracts.table import QUICK
from flax import nnx

import jpeft
from jpeft import seams
from jpeft._method import Method, Start, Targets

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(5), (6, 4, 8))
IDS = np.array([0, 1, 2, 3, 2, 0])
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (6, 7))
MASK = np.arange(7) < np.array([7, 3, 5, 7, 2, 6])[:, None]


def adapted(base, seed, **options):
    method = jpeft.LoRA(**{"targets": ["up", "down"], **options})
    return subjects.fill(jpeft.adapt(base, method, key=jax.random.key(seed)), seed)


def three(base, **options):
    """Other ranks, alphas, roots, starts and patterns."""
    return [
        adapted(base, 1, rank=4, alpha=8, **options),
        adapted(base, 2, rank=8, alpha=5, rslora=True, init="gaussian", **options),
        adapted(base, 3, rank=2, alpha=3, rank_pattern={r".*\.1\..*": 5}, alpha_pattern={r".*up": 7}, **options),
    ]


def run(model, *inputs):
    return np.asarray(jax.jit(lambda *inputs: model(*inputs), compiler_options=QUICK)(*inputs))


def mixed(bank, ids, *inputs, call=lambda model, x: model(x), key=None):
    function = jax.jit(
        lambda bank, ids, key, *inputs: jpeft.apply_bank(bank, ids, call, *inputs, key=key), compiler_options=QUICK
    )
    return function(bank, ids, key, *inputs)


MODELS = {
    "stacked": lambda: subjects.Stacked(8, 3, nnx.Rngs(0)),
    "list": lambda: subjects.ListOfLayers(8, 2, nnx.Rngs(0)),
    "somebody's stack": lambda: subjects.Vmapped(8, 2, nnx.Rngs(0)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_row_is_what_its_adapter_alone_gives(make):
    base = make()
    models = [base, *three(base, bias="lora_only")]
    got = mixed(jpeft.bank(models[1:]), IDS, X)
    alone = [run(model, X) for model in models]
    for row, i in enumerate(IDS):
        assert subjects.error(got[row], alone[i][row]) < subjects.FLOAT32
        assert (subjects.error(got[row], alone[0][row]) > 0.1) == (i > 0)


def test_a_row_is_the_formula_in_float64():
    base = subjects.Stacked(8, 3, nnx.Rngs(0))
    models = [adapted(base, 1, rank=4, alpha=8), adapted(base, 2, rank=8, alpha=32), adapted(base, 3, rank=1, alpha=5)]
    got = mixed(jpeft.bank(models), IDS, X)
    for row, i in enumerate(IDS):
        flat = subjects.as64(subjects.leaves(models[i - 1]))
        expected = subjects.mlp64(flat, np.asarray(X[row], np.float64), 3, [0.0, 2.0, 4.0, 5.0][i], stacked=True)
        assert subjects.error(got[row], expected) < subjects.FLOAT32


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_slot_0_is_the_base_bit_for_bit(make):
    base = make()
    got = mixed(jpeft.bank(three(base, bias="all")), np.zeros(6, int), X)
    plain = jax.jit(jax.vmap(lambda x: base(x[None])[0]), compiler_options=QUICK)(X)
    np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize("family", [BERT, LLAMA], ids=["bert", "llama"])
def test_models_of_the_zoo_with_padded_rows(family):
    targets = ["query", "output.dense"] if family is BERT else ["q_proj", "down_proj", "lm_head"]
    base = jpeft.models.build(family, "TOKEN_CLS" if family is BERT else "CAUSAL_LM", key=jax.random.key(1))
    models = [base, *(adapted(base, i, rank=i, alpha=2 * i + 1, targets=targets, init="pissa") for i in (1, 3))]
    got = mixed(jpeft.bank(models[1:]), IDS % 3, TOKENS, MASK, call=lambda model, *row: model(*row))
    for i, model in enumerate(models):
        alone = run(model, TOKENS, MASK)
        for row in np.flatnonzero(i == IDS % 3):
            assert subjects.error(got[row][MASK[row]], alone[row][MASK[row]]) < 2 * subjects.FLOAT32


def test_ids_permute_rows():
    bank = jpeft.bank(three(subjects.Stacked(8, 2, nnx.Rngs(0))))
    order = np.random.default_rng(1).permutation(6)
    np.testing.assert_array_equal(mixed(bank, IDS[order], X[order]), mixed(bank, IDS, X)[order])


def test_a_gradient_is_the_sum_of_those_of_the_rows_and_padding_has_none():
    base = subjects.Stacked(8, 3, nnx.Rngs(0))
    models = three(base, bias="lora_only")
    bank = jpeft.bank(models)

    def loss(trainable):
        return jnp.tanh(jpeft.apply_bank(bank.with_trainable(trainable), IDS, lambda m, x: m(x), X)).sum()

    got = jax.jit(jax.grad(loss), compiler_options=QUICK)(bank.trainable)
    for path, gradient in got.items():
        assert not gradient[0].any(), path
    for slot, model in enumerate(models, 1):
        graphdef, trainable, frozen = jpeft.partition(model)
        x = X[np.flatnonzero(slot == IDS)]
        alone = jax.grad(lambda t: jnp.tanh(jpeft.combine(graphdef, t, frozen)(x)).sum())(trainable)  # noqa: B023
        for path, expected in alone.items():
            inside = tuple(map(slice, expected.shape))
            assert subjects.error(got[path][slot][inside], expected) < 3 * subjects.FLOAT32, path
            outside = np.array(got[path][slot])
            outside[inside] = 0
            assert not outside.any(), path


def test_one_id_and_its_gradient():
    models = three(subjects.Stacked(8, 2, nnx.Rngs(0)))
    bank = jpeft.bank(models)
    assert subjects.error(bank.combine(*jpeft.select(bank, 2))(X), models[1](X)) < subjects.FLOAT32
    by_axis = jax.vmap(lambda t, c: bank.combine(t, c)(X))(*jpeft.select(bank, np.array([3, 1])))
    assert subjects.error(by_axis[0], models[2](X)) < subjects.FLOAT32
    assert subjects.error(by_axis[1], models[0](X)) < subjects.FLOAT32


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_comes_out_as_it_went_in(make):
    models = three(make(), bias="lora_only")
    bank = jpeft.bank(models)
    assert len(bank) == 4
    for slot, model in enumerate(models, 1):
        assert jpeft.partition(bank.model(slot))[0] == jpeft.partition(model)[0]
        ours, theirs = subjects.leaves(bank.model(slot)), subjects.leaves(model)
        assert ours.keys() == theirs.keys()
        assert all((ours[path] == theirs[path]).all() for path in ours)


def test_pairs_of_partition_make_the_same_bank():
    models = three(subjects.Stacked(8, 2, nnx.Rngs(0)))
    parts = [jpeft.partition(model) for model in models]
    bank = jpeft.bank([part[:2] for part in parts], parts[0][2])
    jax.tree.map(np.testing.assert_array_equal, bank, jpeft.bank(models))


def test_one_program_serves_all_ids_and_holds_the_base_once():
    base = subjects.Stacked(8, 2, nnx.Rngs(0))
    bank = jpeft.bank([adapted(base, rank, rank=rank) for rank in (1, 3, 5)])
    traces = []

    def call(bank, ids, x):
        traces.append(0)
        return jpeft.apply_bank(bank, ids, lambda model, x: model(x), x)

    program = jax.jit(call)
    text = str(program.lower(bank, jnp.asarray(IDS), X).compile().as_text())
    assert not re.findall(r"f32\[6,(?:8,16|16,8)\]", text)  # a kernel, once for every row
    assert re.findall(r"f32\[6,(?:8,5|5,8)\]", text)  # the adapters' own factors, padded to rank 5
    for ids in (IDS, IDS[::-1].copy()):
        program(bank, jnp.asarray(ids), X)
    assert len(traces) == 1


def test_every_row_drops_by_a_key_of_its_own():
    base = subjects.Stacked(8, 2, nnx.Rngs(0))
    models = [adapted(base, 1, rank=2, dropout=0.5), adapted(base, 2, rank=3, dropout=0.5)]
    bank, x, ids = jpeft.bank(models), jnp.tile(X[:1], (4, 1, 1)), np.array([1, 1, 2, 0])
    got = mixed(bank, ids, x, key=KEY)
    for row, i in enumerate(ids):
        with jpeft.dropout_key(jax.random.fold_in(KEY, row)):
            alone = [base, *models][i](x[:1])[0]
        assert subjects.error(got[row], alone) < subjects.FLOAT32
    assert subjects.error(got[0], got[1]) > 0.01


@dataclasses.dataclass(frozen=True)
class Scale(Method):
    """A method that is not the base at zero: it scales inputs and outputs."""

    kind: ClassVar[str] = "scale"

    def select(self, model_type):
        return Targets(("up", "down"))

    def start(self, site, base, key):
        return Start({"inner": jnp.ones((*site.lead, site.d_in)), "outer": jnp.ones((*site.lead, site.d_out))})

    def before(self, adapter, base, *inputs):
        return (inputs[0] * adapter.inner[...][None, None],)

    def after(self, adapter, base, y, *inputs):
        return y / adapter.outer[...][None, None]

    def count(self, site):
        return 0, 0


def test_an_empty_slot_of_a_method_that_is_not_the_base_at_zero():
    base = subjects.Stacked(8, 2, nnx.Rngs(0))
    method = Scale() | jpeft.LoRA(rank=2, targets=["up"])
    models = [subjects.fill(jpeft.adapt(base, method, key=KEY), seed) for seed in (1, 2)]
    got = mixed(jpeft.bank(models), IDS % 3, X)
    alone = [run(model, X) for model in (base, *models)]
    for row, i in enumerate(IDS % 3):
        assert subjects.error(got[row], alone[i][row]) < subjects.FLOAT32
    np.testing.assert_array_equal(got[0], alone[0][0])


@dataclasses.dataclass(frozen=True)
class Tokens(Method):
    """Virtual tokens in front: a method that changes shapes, and so has to say itself how it is left out."""

    kind: ClassVar[str] = "tokens"
    num: int = 2
    padding: bool = True

    def select(self, model_type):
        return Targets(".*", seam="input")

    def start(self, site, base, key):
        return Start({"table": jnp.zeros((self.num, site.d_in))})

    def before(self, adapter, base, *inputs):
        e, positions, mask, segments = inputs
        table = adapter.table[...]
        present = adapter.present[...] if hasattr(adapter, "present") else jnp.ones(len(table), jnp.int32)
        batch, seq, _ = e.shape
        mask = jnp.ones((batch, seq), jnp.int32) if mask is None else mask.astype(jnp.int32)
        mask = jnp.concatenate([jnp.broadcast_to(present[None], (batch, len(table))), mask], 1)
        positions = jnp.concatenate([(jnp.cumsum(present) - present)[None], positions + present.sum()], 1)
        table = jnp.broadcast_to(table[None], (batch, *table.shape))
        return jnp.concatenate([table, e], 1), positions, mask, segments

    def padded(self, adapter, shapes):
        if not self.padding:
            return self, {}
        num = shapes["table"][0]
        return dataclasses.replace(self, num=num), {"present": jnp.arange(num, dtype=jnp.int32) < self.num}

    def count(self, site):
        return 0, 0


def test_virtual_tokens_of_several_numbers():
    base = jpeft.models.build(LLAMA, "CAUSAL_LM", key=jax.random.key(1))
    models = [subjects.fill(jpeft.adapt(base, Tokens(num), key=KEY), num) for num in (1, 4)]
    got = mixed(jpeft.bank(models), IDS % 3, TOKENS, MASK, call=lambda model, *row: model(*row))
    alone = [run(model, TOKENS, MASK) for model in (base, *models)]
    for row, i in enumerate(IDS % 3):
        assert subjects.error(got[row][MASK[row]], alone[i][row][MASK[row]]) < 2 * subjects.FLOAT32
    silent = [jpeft.adapt(base, Tokens(2, padding=False), key=KEY)]
    with pytest.raises(ValueError, match="Tokens does not say how its input are left out"):
        jpeft.bank(silent)


BASE = subjects.Stacked(8, 3, nnx.Rngs(0))
OTHER = subjects.Stacked(8, 3, nnx.Rngs(1))
REFUSED: dict[str, tuple[Any, str]] = {
    "places": (lambda: [adapted(BASE, 1), adapted(BASE, 2, targets=["up"])], "different places: blocks/down"),
    "layers": (lambda: [adapted(BASE, 1), adapted(BASE, 2, layers=[0, 2])], "different layers of blocks/"),
    "biases": (lambda: [adapted(BASE, 1), adapted(BASE, 2, bias="all")], "copies of different leaves"),
    "dropout": (lambda: [adapted(BASE, 1), adapted(BASE, 2, dropout=0.1)], r"LoRA's dropout \(0.0 and 0.1\)"),
    "methods": (
        lambda: [jpeft.adapt(BASE, m, key=KEY, name="a") for m in (jpeft.LoRA(targets=["up", "down"]), Scale())],
        "different methods, LoRA and Scale",
    ),
    "starts": (lambda: [adapted(BASE, 1), adapted(BASE, 2, init="pissa")], "one alone has blocks/.*/A0"),
    "bases": (lambda: [adapted(BASE, 1), adapted(OTHER, 1)], "different bases: blocks/down/bias differs"),
    "no adapter": (lambda: [BASE], "the first model carries no adapter"),
    "nothing": (list, "at least one adapter"),
    "a pair alone": (lambda: [jpeft.partition(adapted(BASE, 1))[:2]], "need the frozen half"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_in_one_bank(make, message):
    with pytest.raises(ValueError, match=message):
        jpeft.bank(make())


def test_ids_that_are_none():
    bank = jpeft.bank(three(BASE))
    with pytest.raises(IndexError, match=r"slots 0 to 3 \(0 is the base\), got \[-1, 4\]"):
        jpeft.select(bank, np.array([4, 1, -1]))
    with pytest.raises(TypeError, match="integers, got float"):
        jpeft.select(bank, np.array([1.0]))
    with pytest.raises(ValueError, match=r"ids has shape \(2,\), the inputs have \[\(6,\)\]"):
        jpeft.apply_bank(bank, np.array([1, 2]), lambda m, x: m(x), X)
    with pytest.raises(IndexError, match=r"slots 1 to 3 \(0 is the base\), not in 0"):
        bank.model(0)
    with pytest.raises(TypeError, match="takes adapted models"):
        jpeft.bank([3])
    with pytest.raises(ValueError, match=r"outside of jax.jit"):
        jax.jit(lambda x: jpeft.bank([adapted(BASE, 1), jax.tree.map(lambda leaf: leaf + x, adapted(BASE, 1))]))(1.0)
    got = mixed(bank, np.array([0, 1, 4, 3, -1, 0]), X)  # traced: nothing can be checked, and nothing is clamped
    assert np.isnan(got).any((1, 2)).tolist() == [False, False, True, False, True, False]


def test_an_ensemble_of_adapters_on_one_example():
    models = three(BASE)
    bank, ids = jpeft.bank(models), np.arange(1, 4)
    logits = mixed(bank, ids, jnp.tile(X[:1], (3, 1, 1)))
    for i, model in enumerate(models):
        assert subjects.error(logits[i], model(X[:1])[0]) < subjects.FLOAT32
    assert jpeft.vote(logits).shape == (4,)


def test_votes():
    logits = jnp.log(jnp.array([[[0.5, 0.4, 0.1]], [[0.5, 0.4, 0.1]], [[0.0, 0.9, 0.1]]]))
    assert jpeft.vote(logits).tolist() == [0]
    assert jpeft.vote(logits, "mean").tolist() == [1]
    assert jpeft.vote(logits[1:]).tolist() == [1]  # one vote each: the likelier
    with pytest.raises(ValueError, match="majority or mean, got 'max'"):
        jpeft.vote(logits, "max")


@pytest.mark.untyped
def test_one_model_and_one_adapters_logits_are_none_of_many():
    with pytest.raises(TypeError, match="takes a list of adapted models, got one Stacked"):
        jpeft.bank(adapted(BASE, 1))
    with pytest.raises(ValueError, match=r"logits \[adapters, ..., classes\], got the shape \[3\]"):
        jpeft.vote(jnp.zeros(3))


def test_the_seams_of_a_bank_are_those_of_the_model():
    model = jpeft.bank(three(BASE)).model(1)
    assert all(seams.kind(m) == "projection" for p, m in nnx.iter_modules(model) if getattr(m, "adapters", None))
