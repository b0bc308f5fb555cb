# SPDX-License-Identifier: Apache-2.0
"""Trainable tokens against the real peft, a float64 formula, tied heads, and what they stand beside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_oracle as oracle
import pytest
import subjects
import torch_twin
from flax import nnx

import jpeft

KEY = jax.random.key(0)
CHOICES = {
    "some": (7, 40, 3, 12),
    "one": (int(oracle.IDS[2, 1]),),
    "with the padding": (0, int(oracle.IDS[2, 2])),
}

#: family, the table's name in transformers
REAL = {
    "bert": ("bert cls", "bert.embeddings.word_embeddings"),
    "llama": ("llama", "model.embed_tokens"),
    "a tied head follows": ("llama tied", "model.embed_tokens"),
}


@pytest.mark.parametrize("tokens", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("family, table", REAL.values(), ids=REAL)
def test_outputs_and_gradients_are_those_of_peft(family, table, tokens):
    """The padding token's vector gets no gradient at the input, in torch as here; as a tied head's column it does.

    peft trains no head of a classification task beside tokens, however fresh; jpeft does unless it is told not to.
    """
    config = peft.TrainableTokensConfig(
        task_type=oracle.FAMILIES[family][1], token_indices=[*tokens], target_modules=[table.rpartition(".")[2]]
    )

    method = jpeft.TrainableTokens(tokens, modules_to_save=())
    values = functools.partial(torch_twin.token_values, table)
    torch_twin.assert_same(family, method, torch_twin.get_peft(family, config), values)


class Tied(nnx.Module):
    """A table read forwards and backwards."""

    def __init__(self, rngs, dtype=jnp.float32):
        self.table = nnx.Embed(9, 5, rngs=rngs, param_dtype=dtype, dtype=dtype)

    def __call__(self, ids):
        return self.table.attend(jnp.tanh(self.table(ids)))


IDS = np.array([[0, 3, 8, 3], [1, 4, 4, 2]])


def formula(table, rows, tokens):
    table = table.astype(rows.dtype)
    table[list(tokens)] = rows
    return np.tanh(table[IDS]) @ table.T


def test_it_is_the_formula_in_float64():
    tokens = (8, 3, 1)
    with jax.enable_x64(True):
        model = jpeft.adapt(Tied(nnx.Rngs(0)), jpeft.TrainableTokens(tokens, targets=["table"]), key=KEY)
        model = subjects.in_float64(subjects.fill(model))
        graphdef, trainable, frozen = jpeft.partition(model)
        flat = subjects.as64(subjects.leaves(model))
        ((path, rows),) = ((p, flat[p]) for p in trainable)
        table = flat["table/embedding"]
        assert rows.shape == (3, 5)
        expected = formula(table.copy(), rows, tokens)
        assert subjects.error(model(IDS), expected) < subjects.FLOAT64
        assert subjects.error(jpeft.merge(model)(IDS), expected) < subjects.FLOAT64
        gradient = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(IDS) ** 2).sum())(trainable)[path]
        exact = subjects.complex_step(lambda f: (formula(table.copy(), f["r"], tokens) ** 2).sum(), {"r": rows})["r"]
        assert subjects.error(gradient, exact) < 1e3 * subjects.FLOAT64


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_merge_writes_the_rows_and_nothing_else(dtype):
    base = Tied(nnx.Rngs(0), dtype)
    model = subjects.fill(jpeft.adapt(base, jpeft.TrainableTokens((8, 3), targets=["table"]), key=KEY))
    (rows,) = jpeft.partition(model)[1].values()
    assert rows.dtype == jnp.float32
    merged, own = (np.asarray(m.table.embedding[...]) for m in (jpeft.merge(model), base))
    np.testing.assert_array_equal(merged[[8, 3]], np.asarray(rows.astype(dtype)))
    others = [i for i in range(9) if i not in (8, 3)]
    np.testing.assert_array_equal(merged[others], own[others])
    assert jpeft.summary(model).trainable == jpeft.summary(model).changed == 2 * 5


def test_other_adapters_add_to_the_rows():
    """In every order in which they may be put on, and through the tied head."""
    tokens = jpeft.TrainableTokens((8, 3), targets=["table"])
    more = jpeft.TrainableTokens([1], targets=["table"])
    lora = jpeft.LoRA(rank=2, alpha=3, targets=["table"])
    model = subjects.fill(jpeft.adapt(Tied(nnx.Rngs(0)), tokens | more | lora, key=KEY))
    assert subjects.error(jpeft.merge(model)(IDS), model(IDS)) < subjects.FLOAT32
    with pytest.raises(ValueError, match=r"and with them what the adapter 'lora' changed; put it on the model before"):
        jpeft.adapt(Tied(nnx.Rngs(0)), lora | tokens, key=KEY)
    with pytest.raises(ValueError, match="'trainable_tokens' trains the row of token 3 in table already"):
        jpeft.adapt(Tied(nnx.Rngs(0)), tokens | jpeft.TrainableTokens([3], targets=["table"]), key=KEY)


WRONG = [
    ({"token_indices": []}, ValueError, "one row for each token that is named, once; got none"),
    ({"token_indices": [1, 2, 1]}, ValueError, "once; got 1 twice"),
    ({"token_indices": [-1]}, ValueError, "token index must be a whole number of at least 0, got -1"),
    ({"token_indices": [1.0]}, ValueError, "got 1.0"),
    ({"token_indices": [True]}, ValueError, "got True"),
    ({"token_indices": "12"}, TypeError, "takes the ids of tokens, got '12'"),
    ({"token_indices": 5}, TypeError, "takes the ids of tokens, got 5"),
    ({"token_indices": [9]}, ValueError, "table has 9 rows, so there is no token 9; enlarge it first"),
    ({"token_indices": [1], "targets": ["tabel"]}, ValueError, "target 'tabel' matches no projection .*nearest: table"),
    ({"token_indices": [1], "targets": None}, ValueError, "knows no table of model type None .*pass targets="),
]


@pytest.mark.parametrize("options, error, message", WRONG, ids=lambda v: str(v) if isinstance(v, dict) else "")
@pytest.mark.untyped
def test_a_wrong_option_is_an_error(options, error, message):
    with pytest.raises(error, match=message):
        jpeft.adapt(Tied(nnx.Rngs(0)), jpeft.TrainableTokens(**{"targets": ["table"], **options}), key=KEY)


def test_only_a_table_has_rows():
    with pytest.raises(ValueError, match=r"trains rows of an embedding table, which blocks/0/up is not"):
        jpeft.adapt(
            subjects.ListOfLayers(4, 1, nnx.Rngs(0)), jpeft.TrainableTokens([1], targets=["blocks.0.up"]), key=KEY
        )


def test_ids_may_come_as_numpys():
    assert jpeft.TrainableTokens(np.array([4, 2])) == jpeft.TrainableTokens((4, 2))
