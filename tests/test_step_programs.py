# SPDX-License-Identifier: Apache-2.0
"""What the compiled train step holds and computes, read off its text: no logits of all tokens, no frozen gradient."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import equations

import jpeft
from jpeft.train._head import CHUNK_LOGITS, PLAIN, Terms
from jpeft.train.losses import SUMS
from jpeft.train.step import begin_shapes, make_step

#: Vocabulary times tokens is 16 times what a chunk holds. No number is another's, so that shapes tell what they are.
VOCAB, ROWS, SEQ = 65_536, 8, 512
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQ,
}
MIXED, LONG = "data=2,fsdp=2,tensor=2", "data=2,sequence=4"


def compiled(axes: str, method: jpeft.Method, terms: Terms = PLAIN, **changes):
    """The text of a step's program and its frozen leaves; nothing is allocated."""

    def build():
        model = jpeft.models.build({**CONFIG, **changes}, key=jax.random.key(0))
        return jpeft.adapt(model, method, key=jax.random.key(1))

    graphdef, trainable, frozen = jpeft.partition(nnx.eval_shape(build))
    count = math.prod(int(size) for size in re.findall(r"\d+", axes))
    mesh = jpeft.mesh(axes, jax.devices()[:count])
    assert {*mesh.axis_types} == {AxisType.Auto}
    places = jpeft.shardings({**trainable, **frozen}, mesh)
    trainable, frozen = (
        {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path]) for path, leaf in half.items()}
        for half in (trainable, frozen)
    )
    tx = optax.adamw(1e-3)
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = NamedSharding(mesh, P(None, ("data", "fsdp")))
    tokens = jax.ShapeDtypeStruct((1, ROWS, SEQ), jnp.int32, sharding=rows)
    batch = dict.fromkeys(("input_ids", "attention_mask", "labels"), tokens)
    sums = functools.partial(SUMS["CAUSAL_LM"], terms=terms)
    update = make_step(graphdef, sums, tx, groups=groups)
    return update.lower(begin_shapes(tx, trainable), frozen, batch, None).compile(), frozen, mesh


def arrays(text: str) -> set[tuple[int, ...]]:
    """Shapes of all floating arrays that a program's text names."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", text)}


#: Label smoothing and z-loss, whose slopes are of the logits' size as the loss's own is.
BOTH = Terms(smoothing=0.1, z=1e-4)
#: A vocabulary of which chunks hold a number of positions that does not divide all.
UNEVEN = VOCAB + 64


@pytest.mark.parametrize(
    "axes, vocab, terms",
    [
        (MIXED, VOCAB, BOTH),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("", VOCAB, PLAIN), ("", UNEVEN, BOTH), (LONG, VOCAB, BOTH), (MIXED, VOCAB, PLAIN), (MIXED, UNEVEN, BOTH),
        )),
    ],
)  # fmt: skip
def test_no_program_holds_the_logits_of_all_tokens(axes, vocab, terms):
    program, frozen, mesh = compiled(axes, jpeft.LoRA(rank=4, targets=["q_proj"]), terms, vocab_size=vocab)
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["sequence"]
    if mesh.shape["tensor"] > 1:
        assert frozen["lm_head/kernel"].sharding.spec[-1] == "tensor"
    assert ROWS * SEQ * VOCAB >= 16 * CHUNK_LOGITS
    largest = max(map(math.prod, arrays(program.as_text())))
    assert largest <= max(CHUNK_LOGITS // ways, *(leaf.size for leaf in frozen.values()))
    kept = 4 * CHUNK_LOGITS // ways
    assert program.memory_analysis().temp_size_in_bytes < 8 * kept < 4 * ROWS * SEQ * VOCAB // ways


@pytest.mark.slow
@pytest.mark.parametrize("axes", [MIXED, LONG])
def test_no_frozen_kernel_has_a_gradients_product_on_a_mesh(axes):
    """What a device multiplies gives no array of a frozen kernel's shape, whole or its own part of it."""
    small = {"vocab_size": 176}
    program, frozen, mesh = compiled(axes, jpeft.LoRA(rank=4, targets="all-linear"), **small)
    everything, *_ = compiled(axes, jpeft.FullFineTune(), **small)
    found, full = (gradient_products(p.as_text(), frozen, mesh) for p in (program, everything))
    assert not found
    assert len(full) >= 7, "the same search finds those of a full fine-tuning"


@pytest.mark.parametrize("method", [jpeft.LoRA(rank=5, targets="all-linear"), jpeft.Houlsby(reduction_factor=16)])
def test_gradients_are_float32_before_devices_sum_them(method):
    """Beside a base in bfloat16 the product that gives a gradient gives float32, and so is what devices then sum."""
    base = jpeft.models.build(CONFIG | {"vocab_size": 176}, key=jax.random.key(0), dtype=jnp.bfloat16)
    model = jpeft.adapt(base, method, key=jax.random.key(1))
    graphdef, trainable, frozen = jpeft.partition(model)
    tokens = jnp.ones((2, 3), jnp.int32)
    batch = dict.fromkeys(("input_ids", "attention_mask", "labels"), tokens)

    def loss(trainable):
        return SUMS["CAUSAL_LM"](jpeft.combine(graphdef, trainable, frozen), batch)[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable)
    assert {value.aval.dtype for value in jaxpr.jaxpr.outvars} == {jnp.dtype("float32")}
    own = {leaf.shape[1:] for leaf in trainable.values() if leaf.ndim >= 3}
    sums = [e for e in equations(jaxpr.jaxpr) if e.primitive.name in ("dot_general", "reduce_sum")]
    shapes = [(tuple(n for n in out.aval.shape if n != 1), out.aval.dtype) for e in sums for out in e.outvars]
    found = [dtype for shape, dtype in shapes if shape in own or shape[::-1] in own]
    assert len(found) >= len(own)
    assert {*found} == {jnp.dtype("float32")}


def gradient_products(text: str, frozen, mesh) -> list[str]:
    """Products that give an array of the shape of a kernel, or of one device's part of it, in either order."""
    shapes = set()
    for path, leaf in frozen.items():
        if path.endswith("kernel"):
            for dims in (leaf.shape[-2:], leaf.sharding.shard_shape(leaf.shape)[-2:]):
                whole = [(a, b) for a in {dims[0], leaf.shape[-2]} for b in {dims[1], leaf.shape[-1]}]
                shapes |= {*whole, *(dims[::-1] for dims in whole)}
    lines = re.findall(r"= (\w+\[[\d,]*\])[^=]*? dot\(", text)
    return [line for line in lines if tuple(map(int, line.split("[")[1][:-1].split(","))) in shapes]
