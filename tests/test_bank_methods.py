# SPDX-License-Identifier: Apache-2.0
"""Adapters of one method and several sizes in one bank: every row is what its adapter alone gives."""

import jax
import numpy as np
import pytest
import subjects
from contracts.models import BERT, LLAMA, TIED, VOCAB
from contracts.table import QUICK

import jpeft

KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (4, 7))
MASK = np.arange(7) < np.array([7, 3, 5, 6])[:, None]
IDS = np.array([2, 0, 1, 2])
#: A dozen float32 products in another order, of padded matrices.
PADDED = 5e-6

FAMILIES = {
    "bert": (BERT, ["query", "output.dense"]),
    "llama": (LLAMA, ["q_proj", "down_proj"]),
    "tied": (TIED, ["v_proj", "embed_tokens"]),
}
METHODS = {
    "dora": lambda targets: [jpeft.DoRA(rank=r, alpha=a, targets=targets) for r, a in ((2, 3), (5, 4))],
    "loha": lambda targets: [jpeft.LoHa(rank=r, alpha=a, targets=targets) for r, a in ((1, 2), (3, 4))],
    "lokr": lambda targets: [jpeft.LoKr(rank=1, alpha=a, targets=targets) for a in (2, 3)],
    "fourierft": lambda targets: [
        jpeft.FourierFT(n_frequency=n, scaling=s, targets=targets) for n, s in ((9, 5), (4, 7))
    ],
    "prompt tuning": lambda _: [jpeft.PromptTuning(num_tokens=n) for n in (1, 4)],
    "p-tuning": lambda _: [jpeft.PTuning(num_tokens=n, hidden_size=6) for n in (3, 2)],
    "prefix tuning": lambda _: [jpeft.PrefixTuning(num_tokens=n, shift_positions=True) for n in (1, 4)],
    "prefix projected": lambda _: [jpeft.PrefixTuning(num_tokens=n, projection=True, layers=[1]) for n in (3, 2)],
    "bottleneck": lambda _: [jpeft.Pfeiffer(reduction_factor=n) for n in (2, 4)],
}


#: Each method on one family, and in the slow lane on the other; on a table that is the head too, those that change one.
RUNS = [
    pytest.param(name, kind, marks=() if i % 2 == (kind == "llama") else pytest.mark.slow)
    for i, name in enumerate(METHODS)
    for kind in ("bert", "llama")
]
RUNS += [("loha", "tied"), ("lokr", "tied")]
RUNS += [pytest.param(name, "tied", marks=pytest.mark.slow) for name in ("dora", "fourierft")]


@pytest.mark.parametrize("name, kind", RUNS)
def test_several_sizes_of_one_method(name, kind):
    family, targets = FAMILIES[kind]
    task = "TOKEN_CLS" if kind == "bert" else "CAUSAL_LM"
    base = jpeft.models.build(family | {"max_position_embeddings": 16}, task, key=jax.random.key(1))
    made = METHODS[name](targets)
    models = [subjects.fill(jpeft.adapt(base, method, key=KEY), i, 0.2) for i, method in enumerate(made)]
    bank = jpeft.bank(models)

    def mixed(bank, tokens, mask):
        return jpeft.apply_bank(bank, IDS, lambda model, *row: model(*row), tokens, mask)

    got = np.asarray(jax.jit(mixed, compiler_options=QUICK)(bank, TOKENS, MASK))
    for i, model in enumerate([base, *models]):
        alone = np.asarray(jax.jit(lambda *rows, m=model: m(*rows), compiler_options=QUICK)(TOKENS, MASK))
        for row in np.flatnonzero(i == IDS):
            assert subjects.error(got[row][MASK[row]], alone[row][MASK[row]]) < PADDED
    assert jpeft.partition(bank.model(2))[0] == jpeft.partition(models[1])[0]
    slope = jax.grad(lambda t: (mixed(bank.with_trainable(t), TOKENS, MASK) ** 2).sum())
    gradient = jax.jit(slope, compiler_options=QUICK)(bank.trainable)
    for path, value in gradient.items():
        assert np.isfinite(value).all(), path
        assert not value[0].any(), path
        for slot, own in enumerate(bank.own, 1):
            outside = np.array(value[slot])
            outside[tuple(map(slice, own.shapes[path]))] = 0
            assert not outside.any(), path
