# SPDX-License-Identifier: Apache-2.0
"""P-tuning against peft's prompt encoder and NumPy, its start, its dropout, its fold, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_oracle
import pytest
import subjects
import virtual_oracle
from contracts.models import LLAMA, MODELS
from contracts.table import IDS
from flax import nnx
from virtual_oracle import run

import jpeft

KEY = jax.random.key(0)
LSTM = {"reparam": "lstm", "num_tokens": 3, "hidden_size": 5, "num_layers": 3}


def adapted(model, **options):
    return subjects.fill(jpeft.adapt(model, jpeft.PTuning(**{"num_tokens": 3, "hidden_size": 5, **options}), key=KEY))


def leaves_of(model):
    return {p.split("/")[-1]: np.asarray(v) for p, v in jpeft.partition(model)[1].items() if p.startswith("adapters/")}


CASES = [
    ("bert cls", {"num_tokens": 3, "hidden_size": 5}),
    ("llama", {"num_tokens": 4}),
    ("bert tokens", LSTM),
    ("llama", LSTM | {"hidden_size": 16, "num_layers": 1}),
]


@pytest.mark.parametrize("family, options", CASES, ids=["mlp bert", "mlp llama", "lstm bert", "lstm llama"])
def test_outputs_and_gradients_are_those_of_peft(family, options):
    names = virtual_oracle.encoder_names(options.get("num_layers", 0))
    config = virtual_oracle.p_tuning_config(peft_oracle.FAMILIES[family][1], options)
    virtual_oracle.compare(family, jpeft.PTuning(**options), config, names)


STARTS = [{"num_tokens": 20, "hidden_size": 24}, LSTM | {"num_tokens": 20}]


@pytest.mark.parametrize("options", STARTS, ids=["mlp", "lstm"])
def test_it_starts_as_pefts(options):
    """The same sizes, and the same spread of every tensor."""
    other = peft.PromptEncoder(
        virtual_oracle.p_tuning_config("CAUSAL_LM", options, token_dim=16, num_transformer_submodules=1)
    )
    theirs = {name: value.detach().numpy() for name, value in other.named_parameters()}
    ours = leaves_of(jpeft.adapt(peft_oracle.jax_model("llama"), jpeft.PTuning(**options), key=KEY))
    assert sum(v.size for v in ours.values()) == sum(v.size for v in theirs.values())
    for name, (found, back) in virtual_oracle.encoder_names(options.get("num_layers", 0)).items():
        expected = back(*(theirs[part] for part in found))
        assert ours[name].shape == expected.shape
        if name == "embedding":
            assert abs(ours[name].std() - 1) < 0.2
            continue
        fan = 5 if name.startswith("lstm") else ours[name.replace("bias", "kernel")].shape[0]
        assert 0.8 * fan**-0.5 < np.abs(ours[name]).max() < fan**-0.5
        assert abs(ours[name].mean()) < fan**-0.5 / ours[name].size ** 0.5 * 3


@pytest.mark.parametrize("options", [{}, LSTM], ids=["mlp", "lstm"])
def test_outputs_are_the_formula(options):
    with jax.enable_x64(True):
        model = subjects.in_float64(adapted(MODELS["foreign"].build(), **options))
        trainable, frozen = (subjects.as64(half) for half in jpeft.partition(model)[1:])
        leaves = {path.split("/")[-1]: value for path, value in trainable.items()}
        expected = virtual_oracle.foreign64(frozen, IDS, prompt=prompt64(leaves, options.get("num_layers", 0)))
        assert subjects.error(run(model, IDS), expected) < subjects.FLOAT64


def prompt64(leaves, layers):
    x = leaves["embedding"]
    for i in range(layers):
        ways = []
        for way in (0, 1):
            w, u, b, c = (leaves[f"lstm_{i}_{name}"][way] for name in ("input", "hidden", "input_bias", "hidden_bias"))
            h, cell, states = np.zeros(len(u)), np.zeros(len(u)), []
            for row in x[::-1] if way else x:
                into, forget, new, out = np.split(row @ w + b + h @ u + c, 4)
                cell = cell / (1 + np.exp(-forget)) + np.tanh(new) / (1 + np.exp(-into))
                h = np.tanh(cell) / (1 + np.exp(-out))
                states.append(h)
            ways.append(np.array(states[::-1] if way else states))
        x = np.concatenate(ways, 1)
    last = 1 if layers else 2
    for i in range(last + 1):
        x = x @ leaves[f"linear_{i}_kernel"] + leaves[f"linear_{i}_bias"]
        x = x if i == last else np.maximum(x, 0)
    return x


@pytest.mark.parametrize("options", [{}, LSTM | {"dropout": 0.4}], ids=["mlp", "lstm"])
@pytest.mark.parametrize("name", ["foreign", "bert"])
def test_folded_it_is_prompt_tuning_with_the_same_outputs(name, options):
    model = adapted(MODELS[name].build(), **options)
    folded = jpeft.fold(model)
    trainable = jpeft.partition(folded)[1]
    own = {path for path in trainable if "saved" not in path}
    assert own == {"adapters/p_tuning/prompt"}
    assert trainable["adapters/p_tuning/prompt"].shape == (3, 8)
    assert subjects.error(run(folded, IDS), run(model, IDS)) < subjects.FLOAT32
    (row,) = jpeft.summary(folded).rows
    assert isinstance(row.method, jpeft.PromptTuning)
    assert row.trainable == 3 * 8 + (18 if name == "bert" else 0)
    prompt = jpeft.adapt(MODELS[name].build(), row.method, key=KEY, name="p_tuning")
    assert jpeft.partition(prompt)[0] == jpeft.partition(folded)[0]
    assert jpeft.partition(jpeft.fold(folded))[0] == jpeft.partition(folded)[0]


def test_dropout_stands_between_the_layers_of_the_lstm():
    """By the call's own key too, and none of it without one."""
    base = jpeft.models.build(LLAMA, "CAUSAL_LM", key=KEY)
    model, plain = (adapted(base, **LSTM, dropout=rate) for rate in (0.4, 0.0))
    np.testing.assert_array_equal(run(model, IDS), run(plain, IDS))
    one, same, other = (run(model, IDS, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert subjects.error(one, other) > 1e-3
    with jpeft.dropout_key(jax.random.key(1)):
        np.testing.assert_array_equal(jpeft.fold(model).adapters["p_tuning"].prompt[...].shape, (3, 8))
    np.testing.assert_array_equal(run(plain, IDS, key=jax.random.key(1)), run(plain, IDS))


def test_counts():
    """PEFT's, by formula and by what is there."""
    config, task = virtual_oracle.SHAPES["bert-base-uncased"]
    mlp = 768 * 128 + 128 + 128 * 128 + 128 + 128 * 768 + 768
    for options, trained in (({}, mlp), ({"reparam": "lstm"}, 1_577_984)):
        method = jpeft.PTuning(num_tokens=20, hidden_size=128, **options)
        model = virtual_oracle.shapes(
            lambda method=method: jpeft.adapt(jpeft.models.build(config, task, key=KEY), method, key=KEY)
        )
        (row,) = jpeft.summary(model).rows
        assert row.trainable == sum(np.prod(v.shape) for v in jpeft.partition(model)[1].values())
        assert row.trainable == 20 * 768 + trained + 2_307
        assert row.changed == 2_307


WRONG = [
    ({"num_tokens": 0}, "PTuning's num_tokens must be a whole number of at least 1, got 0"),
    ({"hidden_size": 0}, "PTuning's hidden_size must be a whole number of at least 1, got 0"),
    ({"reparam": "gru"}, "PTuning's reparam must be one of mlp, lstm; got 'gru'"),
    ({"num_layers": 3}, "num_layers and dropout are of the LSTM; the MLP has three layers"),
    ({"dropout": 0.1}, "num_layers and dropout are of the LSTM; the MLP has three layers"),
    ({"reparam": "lstm", "dropout": 1.0}, r"PTuning's dropout must be in \[0, 1\), got 1.0"),
    (
        {"reparam": "lstm", "dropout": 0.1, "num_layers": 1},
        "dropout stands between layers of the LSTM, and num_l",
    ),
    ({"blocks": "attention"}, "PTuning's blocks must be one of encoder, decoder; got 'attention'"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=lambda value: str(value)[:40])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.PTuning(**options)


def test_a_model_without_an_input_seam_is_refused():
    with pytest.raises(ValueError, match="between embedding and layers"):
        adapted(subjects.Stacked(4, 2, nnx.Rngs(0)))
    with pytest.raises(ValueError, match="has no merged form; keep the adapter beside the base"):
        jpeft.merge(adapted(MODELS["foreign"].build()))
    assert jnp.isfinite(run(adapted(MODELS["foreign"].build()), IDS)).all()
