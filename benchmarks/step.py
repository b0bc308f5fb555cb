# SPDX-License-Identifier: Apache-2.0
"""One LoRA train step against `transformers` + `peft` in eager torch: same shapes, same cores, float32, one run.

    python benchmarks/step.py [--cores 2] [--steps 3] [--repeats 5] [--cases bert llama minilm] [--json FILE]

Prints, per case and side: steps/s, tokens/s, peak memory, compile time, the share of the machine's measured matmul
rate that the step's FLOPs come to, and the ratios. The step: r=8 on query and value (q_proj, v_proj), forward, loss,
backward, AdamW. FLOPs count the frozen base's forward and input-gradient matmuls, attention, and the loss head.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from _sides import Side, pin, serve, take_turns

BERT = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 30522, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
    "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2,
}  # fmt: skip
MINILM = {**BERT, "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 2048,
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip

#: name -> (config, batch, seq)
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "bert": (BERT, 8, 128),
    "llama": (LLAMA, 4, 256),
    "minilm": (MINILM, 32, 64),
}
RANK, ALPHA, RATE = 8, 16, 1e-4


def step_flops(config: dict[str, Any], batch: int, seq: int) -> float:
    """FLOPs of one LoRA step's large matmuls: forward once, and once more for the gradient of the activations."""
    d, f, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    causal = config["model_type"] == "llama"
    mlp = (3 if causal else 2) * d * f
    attended = seq / 2 if causal else seq
    forward = layers * (2 * batch * seq * (4 * d * d + mlp) + 2 * 2 * batch * seq * attended * d)
    forward += layers * 2 * 2 * batch * seq * RANK * 2 * d
    backward = forward + layers * (2 * 2 * batch * seq * attended * d + 2 * 2 * batch * seq * RANK * 2 * d)
    head = 2 * batch * seq * d * config["vocab_size"] if causal else 0
    return forward + backward + 2 * head


def matmul_rate(cores: int) -> float:
    """The machine's rate on a 1024 x 768 x 2048 float32 matmul through XLA, FLOP/s, best of several."""
    import jax
    import jax.numpy as jnp

    from jpeft.train.step import CPU_OPTIONS

    a, b = jnp.ones((1024, 768)), jnp.ones((768, 2048))
    product = jax.jit(lambda a, b: a @ b, compiler_options=CPU_OPTIONS)
    product(a, b).block_until_ready()
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        product(a, b).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 * 768 * 2048 / best


def batch_of(config: dict[str, Any], batch: int, seq: int) -> dict[str, Any]:
    """The same random token ids and labels for both sides, no padding."""
    import numpy as np

    rng = np.random.default_rng(0)
    ids = rng.integers(1, config["vocab_size"], (batch, seq))
    labels = ids if config["model_type"] == "llama" else rng.integers(0, 2, (batch,))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}


def prepare_jpeft(case: str) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """Builds the case in jpeft and compiles its step."""
    cores = pin()
    import jax
    import jax.numpy as jnp
    import optax

    import jpeft
    from jpeft.train.losses import SUMS
    from jpeft.train.step import begin, make_step

    config, batch_size, seq = CASES[case]
    rate = matmul_rate(cores)
    model = jpeft.models.build(config, key=jax.random.key(0))
    model = jpeft.adapt(model, jpeft.LoRA(rank=RANK, alpha=ALPHA), key=jax.random.key(1))
    sums = SUMS[model.task]
    graphdef, trainable, frozen = jpeft.partition(model)
    del model
    tx = optax.adamw(RATE)
    update = make_step(graphdef, sums, tx)
    held = [begin(tx, trainable)]
    batch = {name: jnp.asarray(x, "int32")[None] for name, x in batch_of(config, batch_size, seq).items()}

    def run(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            held[0], metrics = update(held[0], frozen, batch, None)
            metrics.loss.block_until_ready()
            seconds.append(time.perf_counter() - start)
        return seconds

    run(1)
    return {"compile": update.compile_seconds, "rate": rate}, run


def prepare_peft(case: str) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """Builds the case in transformers + peft, eager."""
    cores = pin()
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    config, batch_size, seq = CASES[case]
    hf = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    causal = config["model_type"] == "llama"
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    task = "CAUSAL_LM" if causal else "SEQ_CLS"
    model = get_peft_model(auto.from_config(hf), LoraConfig(r=RANK, lora_alpha=ALPHA, task_type=task))
    model.train()
    batch = {name: torch.from_numpy(value) for name, value in batch_of(config, batch_size, seq).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def run(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            model(**batch).loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    run(1)
    return {"compile": 0.0}, run


PREPARE = {"jpeft": prepare_jpeft, "peft": prepare_peft}


def compare(case: str, cores: list[int], steps: int, repeats: int) -> dict[str, Any]:
    """Measures both sides of one case; prints its lines."""
    config, batch, seq = CASES[case]
    sides = [Side(__file__, name, case, cores) for name in PREPARE]
    result: dict[str, Any] = take_turns(sides, steps, repeats)
    rate, flops = sides[0].start["rate"], step_flops(config, batch, seq)
    result["jpeft"]["compile"] = sides[0].start["compile"]
    for side in sides:
        side.close()
    for name in PREPARE:
        seconds = result[name]["seconds"]
        result[name] |= {"tokens_per_s": batch * seq / seconds, "share": flops / seconds / rate}
        print(
            f"{case:<8}{name:<7}{1 / seconds:8.3f} steps/s {batch * seq / seconds:9.0f} tokens/s "
            f"{result[name]['peak_mb']:8.0f} MB  {100 * flops / seconds / rate:5.1f} % of {rate / 1e9:.0f} GFLOP/s"
            + (f"  compile {result[name]['compile']:.1f} s" if name == "jpeft" else "")
        )
    result["speed_ratio"] = result["peft"]["seconds"] / result["jpeft"]["seconds"]
    result["memory_ratio"] = result["jpeft"]["peak_mb"] / result["peft"]["peak_mb"]
    print(
        f"{case:<8}{result['speed_ratio']:.2f}x peft's step rate at {result['memory_ratio']:.2f}x its memory",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    if options.worker:
        side, case = options.worker
        return serve(lambda: PREPARE[side](case))
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    results = {case: compare(case, cores, options.steps, options.repeats) for case in options.cases}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
