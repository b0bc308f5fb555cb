# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA against the real peft: outputs, gradients, and a whole training with its allocation; formulas in float64."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import peft_leaves
import peft_oracle as oracle
import pytest
import scipy.stats
import subjects
import torch
from flax import nnx
from peft.tuners.adalora.layer import RankAllocator

import jpeft
from jpeft.methods._rank_allocation import Allocation
from jpeft.train.step import begin, make_step

KEY = jax.random.key(0)
#: float32 against torch's, through three layers of unit size.
LAYERS = 1e-5
#: The same after a training of 24 steps, each of which starts from the last one's rounding.
TRAINED = 1e-4
PLAN: dict[str, Any] = {"init_rank": 4, "target_rank": 2, "alpha": 9, "tinit": 4, "tfinal": 6, "total_steps": 24}
PEFT_NAMES = {
    "init_rank": "init_r",
    "target_rank": "target_r",
    "alpha": "lora_alpha",
    "delta_t": "deltaT",
    "total_steps": "total_step",
    "targets": "target_modules",
    "layers": "layers_to_transform",
}


@pytest.fixture(autouse=True, name="torch_seed")
def _torch_seed():
    torch.manual_seed(0)


def both(family, **options):
    """(jpeft's model with numbers in its leaves, peft's with the same)."""
    options = {**PLAN, **options}
    with oracle.quiet():
        config = peft.AdaLoraConfig(**{PEFT_NAMES.get(key, key): value for key, value in options.items()})
        real: Any = peft.get_peft_model(oracle.torch_model(family), config)
    model = jpeft.adapt(oracle.jax_model(family), jpeft.AdaLoRA(**options), key=KEY)
    model = subjects.fill(model, scale=0.1)
    peft_leaves.give(model, real)
    return model, real


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"targets": ["query", "output.dense"]}),
    "bert, a layer and biases": ("bert", {"targets": ["query"], "bias": "lora_only", "layers": [1]}),
    "llama": ("llama", {"targets": ["q_proj", "down_proj"]}),
}


@pytest.mark.parametrize("family, options", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_peft(family, options):
    model, real = both(family, **options)
    graphdef, trainable, frozen = jpeft.partition(model)

    def outputs(trainable):
        return jpeft.combine(graphdef, trainable, frozen)(oracle.IDS, oracle.MASK)

    expected = oracle.torch_outputs(real.eval(), oracle.FAMILIES[family][1])
    assert subjects.error(oracle.seen(jax.jit(outputs)(trainable)), oracle.seen(expected.detach().numpy())) < LAYERS
    oracle.torch_loss(real, family).backward()
    weights = oracle.cotangent(expected)
    gradients = jax.jit(jax.grad(lambda t: (weights * outputs(t)).sum()))(trainable)
    errors = peft_leaves.differences(model, real, gradients, "grad")
    assert max(errors.values()) < LAYERS, max(errors, key=lambda path: errors[path])


# Training.


def torch_regularizer(real, weight):
    """The term that peft adds to a loss that transformers computed."""
    norms = [
        torch.linalg.norm((p @ p.T if "lora_A" in name else p.T @ p) - torch.eye(min(p.shape)))
        for name, p in real.named_parameters()
        if "lora_A" in name or "lora_B" in name
    ]
    return weight * sum(norms) / len(norms)


def test_pefts_loss_has_the_regularizer_of_the_next_test():
    """peft adds it in `AdaLoraModel.forward`, to a loss that the model gives; a PeftModel without a task skips that."""
    model, real = both("llama", targets=["q_proj"])
    ids = torch.tensor(oracle.IDS)
    with torch.no_grad():
        with_it = real.base_model(input_ids=ids, labels=ids).loss
        without = real.base_model.model(input_ids=ids, labels=ids).loss
        own = torch_regularizer(real, 0.5)
    assert abs(float(with_it - without - own)) < 1e-5
    _, trainable, _ = jpeft.partition(model)
    assert abs(float(allocation(model).regularizer(trainable)) - float(own)) < 1e-6


def allocation(model):
    (method,) = {module.adapters.adalora.method for _, module in nnx.iter_modules(model) if hasattr(module, "adapters")}
    places = {
        "/".join((*map(str, path), "adapters/adalora")): module.adapters.adalora.site
        for path, module in nnx.iter_modules(model)
        if hasattr(module, "adapters")
    }
    return Allocation(method, places)


@pytest.mark.parametrize("delta_t", [1, 3])
def test_a_training_is_that_of_peft(delta_t):
    """24 updates by AdamW of the same loss: every leaf and every rank after each of them."""
    family, options = "bert", {"targets": ["query", "output.dense"], "delta_t": delta_t, "layers": [0, 2]}
    model, real = both(family, **options)
    graphdef, trainable, frozen = jpeft.partition(model)
    weights = oracle.cotangent(oracle.torch_outputs(real.eval(), "FEATURE_EXTRACTION"))
    tx = jpeft.optimizer(optax.adamw(1e-2, eps=1e-6, weight_decay=0.01), model=graphdef)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            out = jpeft.combine(graphdef, trainable, frozen)(oracle.IDS, oracle.MASK)
            return (weights * jnp.tanh(out)).sum()

        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    theirs = torch.optim.AdamW([p for p in real.parameters() if p.requires_grad], 1e-2, eps=1e-6, weight_decay=0.01)
    ranks = []
    for number in range(1, PLAN["total_steps"] + 1):
        theirs.zero_grad()
        out = oracle.torch_outputs(real, "FEATURE_EXTRACTION")
        loss = (torch.tensor(weights) * torch.tanh(out)).sum() + torch_regularizer(real, 0.5)
        loss.backward()
        theirs.step()
        real.base_model.update_and_allocate(number)
        trainable, state = step(trainable, state)
        errors = peft_leaves.differences(model, real, trainable, "data")
        assert max(errors.values()) < TRAINED, (number, max(errors, key=lambda path: errors[path]))
        zeros = [((np.asarray(trainable[path])[index] == 0) == (p.detach().numpy()[:, 0] == 0)).all()
                 for path, index, p in peft_leaves.pairs(model, real) if path.endswith("/E")]  # fmt: skip
        assert all(zeros), number
        ranks.append(sum(int((value[np.array([0, 2])] != 0).sum()) for p, value in trainable.items() if p[-1] == "E"))
    start, target = 4 * 2 * 3, 2 * 2 * 3  # both output.dense are targets: three matrices in each of two layers
    assert ranks[: PLAN["tinit"]] == [start] * PLAN["tinit"]
    assert ranks[17:] == [target] * 7
    assert len(set(ranks)) >= 4
    merged = jpeft.merge(jpeft.combine(graphdef, trainable, frozen))
    trained = jpeft.combine(graphdef, trainable, frozen)
    assert subjects.error(merged(oracle.IDS, oracle.MASK), trained(oracle.IDS, oracle.MASK)) < subjects.FLOAT32


@pytest.mark.untyped
def test_the_budget_is_pefts():
    """The number of triplets over it, at every update of several plans."""
    plans = ((0, 0, 7, 3, 1, 5), (5, 30, 200, 12, 8, 24), (1, 2, 90, 6, 5, 7))
    for tinit, tfinal, total, first, target, matrices in plans:
        method = jpeft.AdaLoRA(init_rank=first, target_rank=target, tinit=tinit, tfinal=tfinal, total_steps=total)
        places = {str(i): types.SimpleNamespace(active=(True,), lead=()) for i in range(matrices)}
        own = Allocation(method, places)  # type: ignore[arg-type]
        planned = types.SimpleNamespace(tinit=tinit, tfinal=tfinal, total_step=total, deltaT=1)
        budgets = {"init_bgt": first * matrices, "target_bgt": target * matrices}
        theirs: Any = types.SimpleNamespace(peft_config=planned, **budgets)
        for number in range(1, total + 1):
            budget, _ = RankAllocator.budget_schedule(theirs, number)
            assert int(own.surplus(number)) == first * matrices - budget, number


def test_importance_is_the_formula():
    """Three updates of a known gradient, in float64."""
    with jax.enable_x64(True):
        model = jpeft.adapt(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), adalora(total_steps=9, beta1=0.7, beta2=0.6), key=KEY)
        own = allocation(subjects.in_float64(model))
        own = Allocation(own.method, {"": own.sites["adapters/adalora"]})
        rng = np.random.default_rng(0)
        leaves = {f"/{n}": jnp.asarray(rng.standard_normal(s)) for n, s in (("A", (5, 3)), ("E", (3,)), ("B", (3, 4)))}
        state = own.init(leaves)
        one, two = ({path: np.zeros(leaf.shape) for path, leaf in leaves.items()} for _ in range(2))
        zeros = {path: jnp.zeros_like(leaf) for path, leaf in leaves.items()}
        for _ in range(3):
            gradients = {path: jnp.asarray(rng.standard_normal(leaf.shape)) for path, leaf in leaves.items()}
            state = own._learn(zeros, gradients, state, leaves)
            now = {path: np.abs(np.asarray(leaves[path]) * gradients[path]) for path in leaves}
            one = {path: 0.7 * one[path] + 0.3 * now[path] for path in leaves}
            two = {path: 0.6 * two[path] + 0.4 * np.abs(now[path] - one[path]) for path in leaves}
        part = {path: one[path] * two[path] for path in leaves}
        expected = part["/E"] + part["/A"].mean(0) + part["/B"].mean(1)
        assert subjects.error(own._importance("", own.sites[""], state), expected) < subjects.FLOAT64


def adalora(**options):
    return jpeft.AdaLoRA(**{"init_rank": 3, "target_rank": 1, "targets": ".*", "total_steps": 20, **options})


def test_equally_important_triplets_keep_the_budget():
    """Of a gradient of zeros all are; peft would drop every one of them."""
    model = subjects.fill(jpeft.adapt(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), adalora(total_steps=2), key=KEY))
    _, trainable, _ = jpeft.partition(model)
    tx = jpeft.optimizer(optax.sgd(0.0), model=model)
    state = tx.init(trainable)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert int((trainable["adapters/adalora/E"] != 0).sum()) == 1  # type: ignore[index]


def test_an_orthogonal_factor_has_no_gradient_and_no_nan():
    model = jpeft.adapt(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), adalora(), key=KEY)
    eyes = {"adapters/adalora/A": jnp.eye(5)[:, :3], "adapters/adalora/B": jnp.eye(4)[:3]}
    value, slopes = jax.value_and_grad(allocation(model).regularizer)(eyes)
    assert value == 0
    assert all((slope == 0).all() for slope in slopes.values())


# In the optimizer.


def test_the_step_refuses_an_optimizer_without_the_allocation():
    graphdef, trainable, frozen = jpeft.partition(both("bert", targets=["query"])[0])

    def sums(model, batch, key, groups):
        return (model(batch["input_ids"]) ** 2).sum(), jnp.float32(1)

    batch = {"input_ids": jnp.asarray(oracle.IDS)[None], "labels": jnp.zeros((1, 3))}
    for tx in (optax.adam(1e-3), jpeft.optimizer(optax.adam(1e-3))):
        with pytest.raises(
            ValueError, match=r"'adalora' takes part in every update.*jpeft.optimizer\(tx, model=model\)"
        ):
            make_step(graphdef, sums, tx)(begin(tx, trainable), frozen, batch, None)
    tx = optax.chain(optax.clip(1.0), jpeft.optimizer(optax.adam(1e-3), model=graphdef))
    state, _ = make_step(graphdef, sums, tx)(begin(tx, trainable), frozen, batch, None)
    (steered,) = [part for part in state.optimizer if hasattr(part, "methods")]
    assert int(steered.methods["adalora"].number) == 1
    assert float(steered.methods["adalora"].regularizer) > 0


def test_it_needs_the_parameters():
    model = jpeft.adapt(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), adalora(), key=KEY)
    tx, trainable = jpeft.optimizer(optax.sgd(0.1), model=model), jpeft.partition(model)[1]
    with pytest.raises(ValueError, match="the methods adalora need the parameters"):
        tx.update(trainable, tx.init(trainable))


def test_a_model_without_such_a_method_is_optimized_as_before():
    model = jpeft.adapt(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), jpeft.LoRA(targets=".*"), key=KEY)
    trainable = jpeft.partition(model)[1]
    plain, same = (jpeft.optimizer(optax.adam(0.1), model=m).init(trainable) for m in (None, model))
    assert jax.tree.structure(plain) == jax.tree.structure(same)


def test_many_trainings_at_once_are_one_at_a_time():
    """vmap over leaves and optimizer state."""
    model = subjects.fill(jpeft.adapt(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), adalora(total_steps=3), key=KEY))
    graphdef, trainable, frozen = jpeft.partition(model)
    tx = jpeft.optimizer(optax.adam(0.01), model=graphdef)
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)

    def train(trainable):
        state = tx.init(trainable)
        for _ in range(4):
            gradients = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(x) ** 2).sum())(trainable)
            updates, state = tx.update(gradients, state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        return trainable

    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf[..., ::-1]]), trainable)
    together = jax.jit(jax.vmap(train))(two)
    for i in range(2):
        alone = jax.jit(train)(jax.tree.map(lambda leaf, i=i: leaf[i], two))
        for path, value in alone.items():
            np.testing.assert_allclose(together[path][i], value, rtol=1e-5, atol=1e-6, err_msg=path)
            if path.endswith("/E"):
                assert int((value != 0).sum()) == 1


def test_files_that_peft_cut_are_refused(tmp_path):
    _, real = both("llama", targets=["q_proj"])
    for number in range(1, 25):
        ids = torch.tensor(oracle.IDS)
        real.base_model(input_ids=ids, labels=ids).loss.backward()
        real.base_model.update_and_allocate(number)
    real.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="PEFT cut this adapter's tensors to its rank_pattern"):
        jpeft.import_peft(oracle.jax_model("llama"), tmp_path)


# Start, counts, fields.


def test_it_starts_with_small_factors_and_zero_values():
    model = jpeft.adapt(nnx.Linear(300, 250, rngs=nnx.Rngs(0)), adalora(init_rank=12), key=KEY)
    leaves = subjects.leaves(model)
    a, e, b = (leaves[f"adapters/adalora/{leaf}"] for leaf in "AEB")
    assert (e == 0).all()
    for leaf in (a, b):
        assert scipy.stats.kstest(leaf.ravel(), "norm", (0, 0.02)).pvalue > 0.01


BERT_BASE = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
             "num_attention_heads": 12, "intermediate_size": 3072}  # fmt: skip


def test_the_count_of_a_bert_base():
    """12 triplets of 768 + 768 + 1 on query and value of 12 layers."""

    def build():
        model = jpeft.models.build(BERT_BASE, "FEATURE_EXTRACTION", key=KEY)
        return jpeft.adapt(model, jpeft.AdaLoRA(total_steps=100), key=KEY)

    summary = jpeft.summary(nnx.eval_shape(build))
    assert summary.trainable == 24 * 12 * (2 * 768 + 1) == 442_656
    assert summary.changed == 24 * 768 * 768


WRONG = [
    ({"total_steps": None}, "pass total_steps=, its updates"),
    ({"total_steps": 0}, "AdaLoRA's total_steps must be a whole number of at least 1, got 0"),
    ({"init_rank": 0}, "AdaLoRA's init_rank must be a whole number of at least 1, got 0"),
    ({"target_rank": 1.5}, "got 1.5"),
    ({"target_rank": 4}, "AdaLoRA's ranks only shrink: target_rank 4 is over init_rank 3"),
    ({"tinit": -1}, "AdaLoRA's tinit must be a whole number of at least 0, got -1"),
    ({"delta_t": 0}, "AdaLoRA's delta_t must be a whole number of at least 1, got 0"),
    ({"tinit": 5, "tfinal": 15}, "no update to allocate in: tinit=5 and tfinal=15 take up all 20 of total_steps"),
    ({"beta1": 1.0}, r"AdaLoRA's beta1 must be in \(0, 1\), got 1.0"),
    ({"beta2": 0}, r"AdaLoRA's beta2 must be in \(0, 1\), got 0"),
    ({"orth_reg_weight": -0.5}, "orth_reg_weight must be a number of at least 0, got -0.5"),
    ({"alpha": 0}, "AdaLoRA's alpha must be a positive number .*, got 0"),
    ({"dropout": 1.0}, r"AdaLoRA's dropout must be in \[0, 1\), got 1.0"),
    ({"bias": "some"}, "AdaLoRA's bias must be one of none, lora_only, all; got 'some'"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=lambda value: str(value))
@pytest.mark.untyped
def test_a_wrong_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        adalora(**fields)
