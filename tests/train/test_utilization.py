# SPDX-License-Identifier: Apache-2.0
"""The FLOPs that MFU is counted by, against those of the compiled step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.models import BERT, LLAMA

import jpeft
from jpeft._grouped import ragged_dot
from jpeft.train import utilization
from jpeft.train.losses import SUMS
from jpeft.train.planning.trace import product_flops
from jpeft.train.utilization import flops_per_token, matmul_weights

KEY = jax.random.key(0)
SEQ, ROWS, RANK = 64, 2, 2
WIDE = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "vocab_size": 512}
WIDE |= {"num_attention_heads": 4, "max_position_embeddings": 128}
SUBJECTS = {
    "bert": (BERT | WIDE, "TOKEN_CLS", ["query", "value", "output.dense"]),
    "llama": (LLAMA | WIDE | {"num_key_value_heads": 2}, "CAUSAL_LM", ["q_proj", "v_proj", "down_proj"]),
    "llama, tied": (LLAMA | WIDE | {"num_key_value_heads": 2, "tie_word_embeddings": True}, "CAUSAL_LM", ["q_proj"]),
}
#: Traced products against the formula: the pairs that a causal block of 64 queries computes are counted, not guessed.
CLOSE = 0.02
#: XLA's own count against the formula: it takes in norms, softmaxes and sums too.
COMPILED = 0.08


def methods(targets: list[str]) -> dict[str, Any]:
    lora = {"rank": RANK, "alpha": 3, "targets": targets}
    return {
        "lora": jpeft.LoRA(**lora),
        "lora on the last layer": jpeft.LoRA(**lora, layers=[3]),
        "full": jpeft.METHODS["full"](),
    }


def loss_and_arguments(model: Any, task: str) -> tuple[Any, Any, Any]:
    graphdef, trainable, frozen = jpeft.partition(model)
    ids = np.random.default_rng(0).integers(0, 2, (ROWS, SEQ)).astype(np.int32)
    batch = {"input_ids": ids, "labels": ids}

    def loss(trainable: Any, frozen: Any) -> Any:
        return SUMS[task](jpeft.combine(graphdef, trainable, frozen), batch)[0]

    return loss, trainable, frozen


def of_adapters(trainable: dict[str, jax.Array]) -> float:
    """A and B of LoRA, by hand: forward, gradient of what they read, own gradient; of layers that have them."""
    own = sum(leaf.size for path, leaf in trainable.items() if path.rsplit("/", 1)[-1] in "AB")
    return 6.0 * own


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("method", ["lora", "lora on the last layer", "full"])
def test_the_convention_is_the_compiled_steps_count(subject, method, optimised):
    config, task, targets = SUBJECTS[subject]
    base = jpeft.models.build(config, task, key=KEY, num_labels=2 if task == "TOKEN_CLS" else None, unroll=True)
    model = jpeft.adapt(base, methods(targets)[method], key=KEY)
    loss, trainable, frozen = loss_and_arguments(model, task)
    layers = 1 if "last" in method else 4
    ours = ROWS * SEQ * (flops_per_token(model, task, keys=SEQ) + of_adapters(trainable) * layers / 4)
    recomputed = ROWS * SEQ * layers * 2 * SEQ * 128  # scores, once more in the backward pass
    traced = product_flops(jax.value_and_grad(loss), trainable, frozen)
    assert abs((ours + recomputed) / traced - 1) < CLOSE, (ours, recomputed, traced)
    program = jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen).compile()
    found: Any = program.cost_analysis()
    assert abs((ours + recomputed) / found["flops"] - 1) < COMPILED, (ours, recomputed, found["flops"])


@pytest.mark.parametrize(
    "config, task",
    [
        ({"model_type": "gpt2", "n_embd": 24, "n_head": 3, "n_layer": 2, "vocab_size": 11}, "CAUSAL_LM"),
        ({"model_type": "distilbert", "dim": 24, "n_heads": 3, "n_layers": 2, "vocab_size": 11}, "SEQ_CLS"),
    ],
)
def test_keys_cost_what_a_familys_queries_have_numbers(config, task):
    """By hand: of each layer, 4 operations a key and number of a query, forward, and twice that backward."""
    model = jpeft.models.build(config, task, key=KEY, num_labels=2 if task == "SEQ_CLS" else None)
    model = jpeft.adapt(model, jpeft.METHODS["full"](), key=KEY)
    assert flops_per_token(model, task, keys=7) - flops_per_token(model, task) == 2 * 4 * 7 * 24 * 3


def test_each_part_has_its_share():
    """By hand: a layer's kernels, and the head."""
    config, task, _ = SUBJECTS["llama"]

    def of(method: Any) -> float:
        return flops_per_token(jpeft.adapt(jpeft.models.build(config, task, key=KEY), method, key=KEY), task)

    layer, head = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320, 128 * 512
    lora = {"rank": 2, "targets": ["q_proj"]}
    assert of(jpeft.LoRA(**lora)) == 4 * (4 * layer + head)
    assert of(jpeft.LoRA(**lora, layers=[2, 3])) == 2 * 2 * layer + 4 * 2 * layer + 4 * head
    assert of(jpeft.METHODS["full"]()) == 6 * (4 * layer + head)
    assert of(jpeft.LoRA(rank=2, targets=["lm_head"])) == 2 * (4 * layer + head)  # nothing below is trained
    assert of(jpeft.PromptTuning(num_tokens=3)) == 4 * (4 * layer + head)
    assert of(jpeft.LastLayers(1)) == 2 * 3 * layer + 6 * layer + 4 * head


def test_a_classifiers_head_is_no_tokens():
    model = jpeft.models.build(BERT | WIDE, "SEQ_CLS", key=KEY, num_labels=2)
    assert matmul_weights(model, "SEQ_CLS") == 4 * (4 * 128 * 128 + 2 * 128 * 320)


def test_a_cpus_peak_is_the_fastest_product(monkeypatch):
    """What takes longer had to share the processor."""
    times = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(utilization.time, "perf_counter", lambda: next(times))
    assert utilization.measured_rate(size=8, repeats=3) == 2 * 8**3 / 1.0


def test_products_of_experts_count_one_expert_a_row():
    """On a CPU too, whose blocks of rows are as many as the running program needs; forward, and both gradients."""
    rows, experts, groups = jnp.zeros((70, 5)), jnp.zeros((3, 5, 7)), jnp.array([40, 0, 30])
    slopes = jax.grad(lambda *given: ragged_dot(*given, groups).sum(), (0, 1))
    assert product_flops(slopes, rows, experts) == 3 * 2 * 70 * 5 * 7
