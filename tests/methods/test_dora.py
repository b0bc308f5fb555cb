# SPDX-License-Identifier: Apache-2.0
"""DoRA against the real peft and a float64 formula, its norm without the product of its factors, its neighbours."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_leaves
import peft_oracle as oracle
import pytest
import subjects
import torch
from flax import nnx
from jaxprs import sizes

import jpeft
from jpeft._method import Targets
from jpeft._scope import dropout

KEY = jax.random.key(0)
#: float32 against torch's, through three layers of unit size.
LAYERS = 1e-5
#: A norm of a column of which little is left: the rounding of a square, over what is left of it (1 %), of 48 terms.
CANCELLED = 2e-5


@pytest.fixture(autouse=True, name="torch_seed")
def _torch_seed():
    torch.manual_seed(0)


# Against peft.

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"targets": ["query", "output.dense", "word_embeddings"]}),
    "bert, ranks and biases": (
        "bert",
        {"targets": ["query"], "rank_pattern": {r".*\.1\..*": 4}, "rslora": True, "bias": "lora_only"},
    ),
    "llama, layers": ("llama", {"targets": ["q_proj", "down_proj"], "layers": [0, 2]}),
}
PEFT_NAMES = {"targets": "target_modules", "rslora": "use_rslora", "layers": "layers_to_transform"}


@pytest.mark.parametrize("family, options", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_peft(family, options):
    theirs: Any = {PEFT_NAMES.get(key, key): value for key, value in options.items()}
    with oracle.quiet():
        config = peft.LoraConfig(use_dora=True, r=2, lora_alpha=3, **theirs)
        real = peft.get_peft_model(oracle.torch_model(family), config).eval()
    started = jpeft.adapt(oracle.jax_model(family), jpeft.DoRA(rank=2, alpha=3, **options), key=KEY)
    leaves = jpeft.partition(started)[1]
    for path, index, parameter in peft_leaves.pairs(started, real):
        if path.endswith("/m"):
            assert subjects.error(leaves[path][index], parameter.detach()) < subjects.TORCH, path
    model = subjects.fill(started)
    peft_leaves.give(model, real)
    graphdef, trainable, frozen = jpeft.partition(model)

    def outputs(trainable):
        return jpeft.combine(graphdef, trainable, frozen)(oracle.IDS, oracle.MASK)

    expected = oracle.torch_outputs(real, oracle.FAMILIES[family][1])
    got = jax.jit(outputs)(trainable)
    assert subjects.error(oracle.seen(got), oracle.seen(expected.detach().numpy())) < LAYERS
    oracle.torch_loss(real, family).backward()
    weights = oracle.cotangent(expected)
    gradients = jax.jit(jax.grad(lambda t: (weights * outputs(t)).sum()))(trainable)
    errors = peft_leaves.differences(model, real, gradients, "grad")
    assert max(errors.values()) < LAYERS, max(errors, key=lambda path: errors[path])


class Masked(torch.nn.Module):
    """Dropout with a given mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def test_dropout_is_that_of_peft():
    """With the same mask: what the length adds to the base's output is of the dropped input, the base's own is not."""
    model = nnx.Linear(9, 7, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal())
    model = subjects.fill(jpeft.adapt(model, jpeft.DoRA(rank=2, alpha=3, targets=".*", dropout=0.4), key=KEY))
    graphdef, trainable, frozen = jpeft.partition(model)
    x = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    with jpeft.dropout_key(KEY):
        mask = np.asarray(dropout(jnp.ones(x.shape), 0.4, "/dora"))
    assert len(np.unique(mask)) == 2
    linear = torch.nn.Linear(9, 7)
    linear.weight.data, linear.bias.data = torch.tensor(frozen["kernel"].T), torch.tensor(frozen["bias"])  # type: ignore[arg-type]
    config = peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.4, target_modules=["0"], use_dora=True)
    real: Any = peft.get_peft_model(torch.nn.Sequential(linear), config).train()
    layer = real.base_model.model[0]
    layer.lora_dropout["default"] = Masked(torch.tensor(mask))
    parameters = (layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight)
    for parameter, leaf in zip(parameters, "ABm", strict=True):
        parameter.data = torch.tensor(np.asarray(trainable[f"adapters/dora/{leaf}"]).T.copy())
    expected = real(torch.tensor(x))

    def outputs(trainable):
        with jpeft.dropout_key(KEY):
            return jpeft.combine(graphdef, trainable, frozen)(x)

    assert subjects.error(outputs(trainable), expected.detach()) < subjects.TORCH
    (expected**2).sum().backward()
    gradients = jax.grad(lambda t: (outputs(t) ** 2).sum())(trainable)
    for parameter, leaf in zip(parameters, "ABm", strict=True):
        assert subjects.error(gradients[f"adapters/dora/{leaf}"].T, parameter.grad) < 2 * subjects.TORCH, leaf
    kept = jpeft.combine(graphdef, trainable, frozen)(x)
    assert subjects.error(kept, real.eval()(torch.tensor(x)).detach()) < subjects.TORCH


# Against the formula, in float64.


def lengths(kernel, a, b, scale):
    """||W + s A B||, column by column."""
    return np.sqrt(((kernel + scale * a @ b) ** 2).sum(0))


def forward(flat, x, layers, norms, stacked, start=None):
    """The blocks of `subjects` with DoRA on both projections, given the norms."""
    for i in range(layers):
        h = x
        for name in ("up", "down"):
            where = f"blocks/{name}" if stacked else f"blocks/{i}/{name}"
            leaf = lambda path, where=where, i=i: flat[f"{where}/{path}"][i] if stacked else flat[f"{where}/{path}"]  # noqa: E731
            kernel, (a, b) = leaf("kernel"), (leaf(f"adapters/dora/{side}") for side in "AB")
            delta = 1.5 * a @ b
            if start is not None:
                delta = delta - 1.5 * leaf("adapters/dora/A0") @ leaf("adapters/dora/B0")
            norm = norms.setdefault((i, name), np.sqrt(((kernel + delta).real ** 2).sum(0)))
            h = h @ ((kernel + delta) * leaf("adapters/dora/m") / norm) + leaf("bias")
            h = np.tanh(h) if name == "up" else h
        x = x + h
    return x


@pytest.mark.parametrize("make", [subjects.ListOfLayers, subjects.Stacked], ids=["a list", "a stack"])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_it_is_the_formula_with_the_norm_held_constant(make, init):
    method = jpeft.DoRA(rank=2, alpha=3, targets=["up", "down"], init=init)
    with jax.enable_x64(True):
        model = subjects.in_float64(subjects.fill(jpeft.adapt(make(5, 2, nnx.Rngs(0)), method, key=KEY)))
        graphdef, trainable, frozen = jpeft.partition(model)
        for path in (path for path in frozen if path.endswith("/square")):  # in float64 as well
            kernel = frozen[path.replace("adapters/dora/square", "kernel")]
            frozen[path] = (kernel**2).sum(-2)
        x = np.random.default_rng(1).standard_normal((3, 5))
        flat, norms = subjects.as64({**trainable, **frozen}), {}
        start = None if init == "default" else init
        expected = forward(flat, x, 2, norms, make is subjects.Stacked, start)
        run = jax.jit(lambda t: jpeft.combine(graphdef, t, frozen)(x))
        assert subjects.error(run(trainable), expected) < subjects.FLOAT64
        gradients = jax.grad(lambda t: jnp.sin(run(t)).sum())(trainable)
        own = subjects.as64(trainable)
        exact = subjects.complex_step(
            lambda t: np.sin(forward({**flat, **t}, x, 2, dict(norms), make is subjects.Stacked, start)).sum(), own
        )
    for path, gradient in gradients.items():
        assert subjects.error(gradient, exact[path]) < subjects.FLOAT64, path


def kinds():
    rngs, noise = nnx.Rngs(0), nnx.initializers.normal()
    rng = np.random.default_rng(0)
    return {
        "linear": (nnx.Linear(6, 5, rngs=rngs, bias_init=noise), rng.standard_normal((4, 6))),
        "several axes": (
            nnx.LinearGeneral((3, 2), (2, 4), axis=(-2, -1), rngs=rngs, bias_init=noise),
            rng.standard_normal((4, 3, 2)),
        ),
        "einsum": (
            nnx.Einsum("bti,ihd->bthd", (6, 2, 3), (2, 3), rngs=rngs, bias_init=noise),
            rng.standard_normal((2, 3, 6)),
        ),
        "outputs not last": (
            nnx.Einsum("bti,io->bot", (6, 3), (3,), rngs=rngs, bias_init=noise),
            rng.standard_normal((2, 3, 6)),
        ),
        "embedding": (nnx.Embed(9, 4, rngs=rngs), rng.integers(0, 9, (3, 5))),
        "convolution": (
            nnx.Conv(2, 3, (3, 2), (2, 1), rngs=rngs, bias_init=noise),
            rng.standard_normal((2, 7, 6, 2)),
        ),
    }


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_module_and_its_merge(kind):
    """As the module itself with the kernel of the formula."""
    base, x = kinds()[kind]
    x = x if x.dtype == int else x.astype(np.float32)
    model = subjects.fill(jpeft.adapt(base, jpeft.DoRA(rank=2, alpha=3, targets=".*"), key=KEY))
    leaves = subjects.leaves(model)
    a, b, m = (leaves[f"adapters/dora/{leaf}"].astype(np.float64) for leaf in "ABm")
    name = "embedding" if kind == "embedding" else "kernel"
    kernel = leaves[name].astype(np.float64).reshape(a.shape[0], b.shape[1])
    new = (kernel + 1.5 * a @ b) * m / lengths(kernel, a, b, 1.5)
    merged = jpeft.merge(model)
    assert subjects.error(subjects.leaves(merged)[name], new.reshape(leaves[name].shape)) < subjects.MERGED
    plain = nnx.clone(base)
    getattr(plain, name)[...] = jnp.asarray(new.reshape(leaves[name].shape), jnp.float32)
    assert subjects.error(model(x), plain(x)) < subjects.FLOAT32


# The norm.


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_no_matrix_of_the_kernels_size_is_made(init):
    """Neither in the forward nor in the backward pass: the largest intermediate is [d_out, rank]-sized."""
    base = nnx.Linear(60, 50, rngs=nnx.Rngs(0))
    model = jpeft.adapt(base, jpeft.DoRA(rank=2, targets=".*", init=init), key=KEY)
    graphdef, trainable, frozen = jpeft.partition(model)
    x = jnp.ones((3, 60))

    def loss(trainable, x):
        return (jpeft.combine(graphdef, trainable, frozen)(x) ** 2).sum()

    for program in (loss, jax.grad(loss)):
        largest = max(sizes(jax.make_jaxpr(program)(trainable, x).jaxpr))
        assert largest <= 60 * 2 * 2, largest
    used = jax.jit(loss).lower(trainable, x).compile().memory_analysis()
    assert used is not None
    assert used.temp_size_in_bytes < 4 * 60 * 50


def test_a_column_that_is_all_but_wiped_out():
    """A B takes nine tenths of the kernel away again: what is left has lost two digits, and no more."""
    base = nnx.Linear(48, 40, rngs=nnx.Rngs(0))
    model = jpeft.adapt(base, jpeft.DoRA(rank=40, alpha=40, targets=".*"), key=KEY)
    graphdef, trainable, frozen = jpeft.partition(model)
    a, b = -0.9 * np.asarray(frozen["kernel"]), np.eye(40, dtype=np.float32)
    flat = {**trainable, "adapters/dora/A": jnp.asarray(a), "adapters/dora/B": jnp.asarray(b)}
    kernel = np.asarray(frozen["kernel"], np.float64)
    exact = (kernel + a.astype(np.float64) @ b) * np.asarray(trainable["adapters/dora/m"]) / lengths(kernel, a, b, 1)
    merged = jpeft.merge(jpeft.combine(graphdef, flat, frozen))
    assert subjects.error(merged.kernel[...], exact) < CANCELLED


def test_a_column_of_zeros_is_no_nan():
    base = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    base.kernel[...] = base.kernel[...].at[:, 2].set(0)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    model = jpeft.adapt(base, jpeft.DoRA(rank=2, targets=".*"), key=KEY)
    np.testing.assert_array_equal(model(x), base(x))
    graphdef, trainable, frozen = jpeft.partition(model)
    gradients = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(x) ** 2).sum())(trainable)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert np.isfinite(subjects.fill(model)(x)).all()


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora"])
def test_it_starts_as_the_base_bit_for_bit(init):
    """Also in bfloat16, under jit, and in the layers of a stack, where norms could be summed in another order."""
    base = subjects.cast(subjects.Stacked(6, 2, nnx.Rngs(0)), jnp.bfloat16 if init == "gaussian" else jnp.float32)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    model = jpeft.adapt(base, jpeft.DoRA(rank=2, targets=["up", "down"], init=init), key=KEY)
    run = jax.jit(lambda model: model(x))
    np.testing.assert_array_equal(run(model), run(base))


def test_a_layer_that_is_not_adapted_is_the_base():
    base = subjects.Stacked(6, 3, nnx.Rngs(0))
    model = subjects.fill(jpeft.adapt(base, jpeft.DoRA(rank=2, targets=["up"], layers=[1]), key=KEY))
    graphdef, trainable, frozen = jpeft.partition(model)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(x) ** 2).sum()))(trainable)
    for gradient in gradients.values():
        assert not gradient[0].any()
        assert not gradient[2].any()
        assert gradient[1].any()
    merged, kernel = (subjects.leaves(m)["blocks/up/kernel"] for m in (jpeft.merge(model), base))
    np.testing.assert_array_equal(merged[[0, 2]], kernel[[0, 2]])
    assert (merged[1] != kernel[1]).any()


# Its neighbours.


def lora(**options):
    return jpeft.LoRA(**{"rank": 2, "targets": ["up"], **options})


def test_it_must_come_first():
    base, dora = subjects.Stacked(6, 2, nnx.Rngs(0)), jpeft.DoRA(rank=2, targets=["up"])
    for before in (lora(), dora):
        adapted = jpeft.adapt(base, before, key=KEY)
        with pytest.raises(ValueError, match=r"blocks/up: DoRA .* stands before it: put DoRA there first, as in"):
            jpeft.adapt(adapted, dora, key=KEY, name="second")
    with pytest.raises(ValueError, match="the adapter 'lora', a LoRA, stands before it"):
        jpeft.adapt(base, lora() | dora, key=KEY)
    for fine in (dora | lora(), lora(layers=[0]) | jpeft.DoRA(rank=2, targets=["up"], layers=[1])):
        model = subjects.fill(jpeft.adapt(base, fine, key=KEY))
        x = np.ones((2, 6), np.float32)
        assert subjects.error(jpeft.merge(model)(x), model(x)) < subjects.FLOAT32
    jpeft.adapt(base, lora(targets=["down"], bias="all") | dora, key=KEY)


def test_a_kernel_that_another_one_changes_is_refused():
    base, dora = subjects.Stacked(6, 2, nnx.Rngs(0)), jpeft.DoRA(rank=2, targets=["up"])
    trains = lora(targets=["down"], modules_to_save=["up"])
    with pytest.raises(ValueError, match=r"blocks/up: DoRA .* 'lora', a LoRA, changes that in whatever order"):
        jpeft.adapt(base, dora | trains, key=KEY)
    with pytest.raises(ValueError, match=r"blocks/up: DoRA .* 'lora', a LoRA, changes that in whatever order"):
        jpeft.adapt(base, trains | dora, key=KEY)


@dataclasses.dataclass(frozen=True)
class OnTheWayIn(jpeft.Method):
    """Stands for a method that acts on what goes into a module."""

    kind: ClassVar[str] = "on_the_way_in"

    def select(self, model_type):
        return Targets(("up",))

    def on_the_way_in(self, site):
        return True

    def count(self, site):
        return 0, 0


def test_a_method_that_acts_on_the_input_is_refused():
    base, dora = subjects.Stacked(6, 2, nnx.Rngs(0)), jpeft.DoRA(rank=2, targets=["up"])
    with pytest.raises(ValueError, match=r"blocks/up: DoRA .* a OnTheWayIn, changes that in whatever order"):
        jpeft.adapt(base, dora | OnTheWayIn(), key=KEY)
    with pytest.raises(ValueError, match="stands before it"):
        jpeft.adapt(base, OnTheWayIn() | dora, key=KEY)


# Counts and fields.

BERT_BASE = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
             "num_attention_heads": 12, "intermediate_size": 3072}  # fmt: skip


def test_the_count_of_a_bert_base():
    """Rank 8 on query and value: LoRA's 294,912 and a length for each of 24 x 768 columns."""

    def build():
        model = jpeft.models.build(BERT_BASE, "FEATURE_EXTRACTION", key=KEY)
        return jpeft.adapt(model, jpeft.DoRA(rank=8), key=KEY)

    summary = jpeft.summary(nnx.eval_shape(build))
    assert summary.trainable == 313_344
    assert summary.changed == 24 * 768 * 768


WRONG = [
    ({"rank": 0}, "DoRA's rank must be a whole number of at least 1, got 0"),
    ({"alpha": 0}, "DoRA's alpha must be a positive number .*, got 0"),
    ({"dropout": 1.0}, r"DoRA's dropout must be in \[0, 1\), got 1.0"),
    ({"init": "pisa"}, "DoRA's init must be one of default, gaussian, orthogonal, pissa, olora; got 'pisa'"),
    ({"bias": "some"}, "DoRA's bias must be one of none, lora_only, all; got 'some'"),
    ({"targets": ".*", "layers": [1]}, "layers= picks among listed targets"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=lambda value: str(value))
@pytest.mark.untyped
def test_a_wrong_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        jpeft.DoRA(**{"targets": ["a"], **fields})


def test_no_default_targets_is_an_error():
    with pytest.raises(ValueError, match="DoRA knows no default targets for model type None"):
        jpeft.adapt(subjects.Stacked(6, 2, nnx.Rngs(0)), jpeft.DoRA(), key=KEY)
