# SPDX-License-Identifier: Apache-2.0
"""The backward pass ends at the lowest layer that has something to train; below it layers run forward only."""

from typing import Any

import jax
import numpy as np
import pytest
import subjects
from contracts.lines import METHODS
from contracts.models import BERT, LLAMA, MODELS

import jpeft
from jpeft.train.losses import lm_loss
from jpeft.train.planning.trace import product_flops

KEY = jax.random.key(0)
LAYERS = 4
CONFIG = LLAMA | {"num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 32}
IDS = np.random.default_rng(0).integers(0, 32, (2, 16))
BATCH = {"input_ids": IDS, "labels": IDS, "attention_mask": np.ones_like(IDS)}
#: Rounding of two programs that compute the same in another order.
CLOSE = 1e-5


def adapted(*methods: Any, **options: Any) -> tuple[Any, dict[str, jax.Array], dict[str, jax.Array]]:
    """A Llama with these methods, noise in all their leaves."""
    model = jpeft.models.build(CONFIG, "CAUSAL_LM", key=KEY, **options)
    for method in methods:
        model = jpeft.adapt(model, method, key=KEY)
    graphdef, trainable, frozen = jpeft.partition(model)
    noise = np.random.default_rng(1)
    return graphdef, {p: v + 0.1 * noise.standard_normal(v.shape).astype(v.dtype) for p, v in trainable.items()}, frozen


def lora(layers: Any = None, name: str = "q_proj") -> jpeft.LoRA:
    return jpeft.LoRA(rank=2, alpha=3, targets=[name, "down_proj"], layers=layers)


def loss_of(graphdef: Any) -> Any:
    return lambda trainable, frozen: lm_loss(jpeft.combine(graphdef, trainable, frozen), BATCH)


def backward_flops(layers: Any, remat: str) -> float:
    """Operations of the gradient's products beyond those of the loss alone."""
    graphdef, trainable, frozen = adapted(lora(layers), remat=remat)
    loss = loss_of(graphdef)
    return product_flops(jax.value_and_grad(loss), trainable, frozen) - product_flops(loss, trainable, frozen)


@pytest.mark.parametrize("remat", ["none", "dots", "full", "names"])
def test_a_layer_below_the_first_adapted_one_costs_no_backward_pass(remat):
    every, half, last = (backward_flops(layers, remat) for layers in (None, [2, 3], [3]))
    a_layer = (half - last) / 1
    assert last < 0.45 * every
    assert abs((every - half) / (2 * a_layer) - 1) < 0.02  # two layers more, twice as much


def kept_by_a_layer(model: str, method: jpeft.Method, scheme: str | None = None) -> list[Any]:
    """What the backward pass is given of every layer, `[layers, batch, tokens, ...]`, under `names`."""
    config, layers = {"llama": LLAMA, "bert": BERT}[model] | {"hidden_size": 64, "intermediate_size": 96}, 2
    built = jpeft.models.build(config, TASKS[model], key=KEY, remat="names")
    built = jpeft.quantize(built, scheme) if scheme else built
    graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(built, method, key=KEY))

    def forward(trainable: Any) -> jax.Array:
        with jpeft.dropout_key(KEY):
            return jpeft.combine(graphdef, trainable, frozen)(FEW)

    kept = jax.tree.leaves(jax.eval_shape(lambda trainable: jax.vjp(forward, trainable)[1], trainable))
    return [leaf for leaf in kept if leaf.ndim > 3 and leaf.shape[:2] == (layers, len(FEW))]


TASKS, FEW = {"llama": "CAUSAL_LM", "bert": "TOKEN_CLS"}, np.arange(15).reshape(3, 5) % 11


@pytest.mark.parametrize("scheme", [None, "nf4"])
@pytest.mark.parametrize("model", TASKS)
def test_what_is_named_is_kept_once(model, scheme):
    """Of a layer's two named arrays that the backward pass reads, one copy each, however many products read them."""
    kept = kept_by_a_layer(model, jpeft.LoRA(rank=2, targets="all-linear"), scheme)
    assert [leaf.shape for leaf in kept] == 2 * [(2, *FEW.shape, 64)]


#: Methods that compute something of a layer's stream again for themselves, alone or in what they put around a norm.
AGAIN = (
    "lora of several ranks, with biases and dropout", "dora of several ranks from the kernel, with biases and dropout",
    "vera with dropout", "oft exact, shared, bounded, with dropout", "loha", "fourierft", "houlsby with dropout",
    "pfeiffer of several widths, with norms and a coupling", "adapter fusion", "loreft", "noreft", "direft",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("loreft", "fourierft") else pytest.mark.slow) for name in AGAIN]
)
def test_what_is_named_is_kept_once_by_every_method(name):
    line = METHODS[name]
    for model in TASKS.keys() & line.on:
        kept = kept_by_a_layer(model, line.make(MODELS[model].targets))
        assert [leaf.shape for leaf in kept] == 2 * [(2, *FEW.shape, 64)], model


@pytest.mark.parametrize("method", [jpeft.LoRA(rank=2, targets="all-linear"), jpeft.LoReFT(modules_to_save=())])
def test_what_is_offloaded_lies_on_the_host_and_nowhere_else(method):
    """Of what the layers keep for the backward pass, which the forward pass's scan gives out."""
    model = jpeft.models.build(LLAMA | {"hidden_size": 64}, key=KEY, remat="offload")
    graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(model, method, key=KEY))

    def loss(trainable: Any) -> jax.Array:
        return jpeft.combine(graphdef, trainable, frozen)(FEW).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable)
    forward = next(equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    kept = [str(out.aval) for out in forward.outvars if out.aval.shape[:3] == (2, *FEW.shape)]
    assert kept == 2 * ["float32<host>[2,3,5,64]"]


def test_the_last_layers_trained_whole_cost_no_backward_pass_below():
    def flops(n: int) -> float:
        graphdef, trainable, frozen = adapted(jpeft.LastLayers(n))
        loss = loss_of(graphdef)
        return product_flops(jax.grad(loss), trainable, frozen) - product_flops(loss, trainable, frozen)

    one, two, every = (flops(n) for n in (1, 2, LAYERS))
    assert abs((every - one) / (3 * (two - one)) - 1) < 0.02


def test_the_compiled_program_costs_less():
    """By XLA's own count, of a loop that is written out, since it counts the body of one once."""

    def flops(layers: Any) -> float:
        graphdef, trainable, frozen = adapted(lora(layers), unroll=True)
        program = jax.jit(jax.grad(loss_of(graphdef))).lower(trainable, frozen).compile()
        found: Any = program.cost_analysis()
        return found["flops"]

    assert flops([3]) < 0.75 * flops(None)


@pytest.mark.parametrize("options", [{"remat": "none"}, {"remat": "full"}], ids=str)
def test_gradients_are_those_of_adapters_on_all_layers_that_do_nothing_below(options):
    graphdef, trainable, frozen = adapted(lora([2, 3]), **options)
    every, _, _ = adapted(lora(), **options)
    still = {p: v.at[:2].set(0) if p.endswith("/B") else v for p, v in trainable.items()}
    got, slopes = jax.jit(jax.value_and_grad(loss_of(graphdef)))(trainable, frozen)
    expected, others = jax.jit(jax.value_and_grad(loss_of(every)))(still, frozen)
    assert abs(got - expected) < CLOSE
    for path, slope in slopes.items():
        assert not slope[:2].any(), path
        assert subjects.error(slope[2:], others[path][2:]) < CLOSE, path


def test_what_is_trained_below_the_stack_has_its_gradient():
    """A prompt in front of the layers, of which the lower ones are only passed through."""
    prompt = jpeft.PromptTuning(num_tokens=3)
    graphdef, trainable, frozen = adapted(lora([3]), prompt)
    every, _, _ = adapted(lora(), prompt)
    still = {p: v.at[:3].set(0) if p.endswith("/B") else v for p, v in trainable.items()}
    slopes = jax.jit(jax.grad(loss_of(graphdef)))(trainable, frozen)
    others = jax.jit(jax.grad(loss_of(every)))(still, frozen)
    (path,) = (p for p in slopes if "prompt" in p)
    assert np.abs(slopes[path]).max() > 1e-4
    assert subjects.error(slopes[path], others[path]) < CLOSE


def test_another_method_in_a_lower_layer_is_trained():
    graphdef, trainable, frozen = adapted(lora([3]), jpeft.NormTuning())
    slopes = jax.jit(jax.grad(loss_of(graphdef)))(trainable, frozen)
    norms = [slope for path, slope in slopes.items() if "norm" in path and slope.shape[0] == LAYERS]
    assert norms
    assert all(np.abs(slope[0]).max() > 1e-5 for slope in norms)


def test_no_kernel_is_kept_again_for_the_backward_pass():
    """Each layer looks it up in the whole stack, and once more on the way back."""
    graphdef, trainable, frozen = adapted(lora([2, 3]))
    jaxpr = jax.make_jaxpr(jax.grad(loss_of(graphdef)))(trainable, frozen)
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    made = {variable.aval.shape for scan in scans for variable in scan.outvars}
    kernels = {leaf.shape[1:] for path, leaf in frozen.items() if path.endswith("/kernel") and leaf.ndim == 3}
    assert not {shape[1:] for shape in made if len(shape) == 3} & kernels
