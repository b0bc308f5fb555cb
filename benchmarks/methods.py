# SPDX-License-Identifier: Apache-2.0
"""One train step of every method, and of PEFT's where it has the method: same model, same cores, float32, one run.

    python benchmarks/methods.py [--model minilm] [--cores 2] [--steps 3] [--repeats 5] [--methods lora ...] [--json F]

The model: MiniLM's shape (22.7M parameters) as a classifier, on 16 rows of 64 tokens; BERT-base's (`bert`), 8 rows of
128; or a language model of Llama's make with 12 layers and d=768 (`llama`), 4 rows of 256. Forward, loss, backward,
AdamW. Prints, per method: trained parameters, milliseconds a step, the ratio to PEFT's step and to jpeft's own LoRA
step, peak memory of both, compile time, the share of the machine's measured matmul rate that the base's own FLOPs
(frozen: 4 N; full fine-tuning: 6 N) come to, and milliseconds of jpeft's answer to one such row: forward with the
adapter beside the base and with it merged, and of a language model each token written after it, likewise.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from _sides import Side, pin, serve, take_turns
from step import BERT, LLAMA, MINILM, batch_of, matmul_rate, step_flops

RATE = 1e-4
#: name -> (config, rows, tokens a row)
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "minilm": (MINILM, 16, 64),
    "bert": (BERT, 8, 128),
    "llama": (LLAMA, 4, 256),
}
#: Query and value, the norms, and the table of tokens, by the model's type.
QV = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
NORMS = {"bert": ["LayerNorm"], "llama": ["input_layernorm", "post_attention_layernorm", "norm"]}
TABLE = {"bert": ["word_embeddings"], "llama": ["embed_tokens"]}
PHRASE = [1037, 2204, 3185]


def methods(targets: list[str]) -> dict[str, Any]:
    """Every method as it is compared, by its kind; those that ask for targets have these."""
    import jpeft as j

    return {
        "lora": j.LoRA(rank=8, alpha=16, targets=targets),
        "dora": j.DoRA(rank=8, alpha=16, targets=targets),
        "adalora": j.AdaLoRA(init_rank=12, target_rank=8, targets=targets, tinit=1, tfinal=1, total_steps=1000),
        "loha": j.LoHa(rank=8, alpha=16, targets=targets),
        "lokr": j.LoKr(rank=8, alpha=16, targets=targets),
        "vera": j.VeRA(rank=256, targets=targets),
        "oft": j.OFT(block_size=32, targets=targets),
        "fourierft": j.FourierFT(n_frequency=1000, targets=targets),
        "ia3": j.IA3(),
        "norm_tuning": j.NormTuning(),
        "trainable_tokens": j.TrainableTokens(token_indices=PHRASE),
        "prompt_tuning": j.PromptTuning(num_tokens=20),
        "p_tuning": j.PTuning(num_tokens=20),
        "prefix_tuning": j.PrefixTuning(num_tokens=20),
        "bitfit": j.BitFit(),
        "houlsby": j.Houlsby(),
        "pfeiffer": j.Pfeiffer(),
        "parallel": j.ParallelAdapter(),
        "compacter": j.Compacter(),
        "loreft": j.LoReFT(rank=4),
        "full": j.FullFineTune(),
        "last_layers": j.LastLayers(2),
    }


def peft_methods(config: dict[str, Any]) -> dict[str, Any]:
    """PEFT's configurations of the same."""
    import peft as p

    family = config["model_type"]
    targets: Any = QV[family]
    prompt: dict[str, Any] = {"num_virtual_tokens": 20}
    return {
        "lora": p.LoraConfig(r=8, lora_alpha=16, target_modules=targets),
        "dora": p.LoraConfig(r=8, lora_alpha=16, target_modules=targets, use_dora=True),
        "adalora": p.AdaLoraConfig(init_r=12, target_r=8, target_modules=targets, tinit=1, tfinal=1, total_step=1000),
        "loha": p.LoHaConfig(r=8, alpha=16, target_modules=targets),
        "lokr": p.LoKrConfig(r=8, alpha=16, target_modules=targets),
        "vera": p.VeraConfig(r=256, target_modules=targets),
        "oft": p.OFTConfig(oft_block_size=32, r=0, target_modules=targets),
        "fourierft": p.FourierFTConfig(n_frequency=1000, target_modules=targets),
        "ia3": p.IA3Config(),  # where PEFT puts it in this family
        "norm_tuning": p.LNTuningConfig(target_modules=NORMS[family]),
        "trainable_tokens": p.TrainableTokensConfig(token_indices=PHRASE, target_modules=TABLE[family]),
        "prompt_tuning": p.PromptTuningConfig(**prompt),
        "p_tuning": p.PromptEncoderConfig(encoder_hidden_size=config["hidden_size"], **prompt),
        "prefix_tuning": p.PrefixTuningConfig(**prompt),
        "full": None,
    }


#: Those that PEFT has, in this order; and those that it has not.
SHARED = (
    "lora",
    "dora",
    "adalora",
    "loha",
    "lokr",
    "vera",
    "oft",
    "fourierft",
    "ia3",
    "norm_tuning",
    "trainable_tokens",
)
SHARED += ("prompt_tuning", "p_tuning", "prefix_tuning", "full")
OWN = ("bitfit", "houlsby", "pfeiffer", "parallel", "compacter", "loreft", "last_layers")


def refused(model: str) -> tuple[str, ...]:
    """The methods that have nothing to train in a model: a Llama has no biases."""
    return ("bitfit",) if MODELS[model][0]["model_type"] == "llama" else ()


def adapted(model: str, name: str) -> Any:
    """The model with random weights and the method's adapter."""
    import jax

    import jpeft

    config = MODELS[model][0]
    base = jpeft.models.build(config, key=jax.random.key(0))
    return jpeft.adapt(base, methods(QV[config["model_type"]])[name], key=jax.random.key(1))


def prepare_jpeft(model: str, name: str) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """Builds the method's model in jpeft and compiles its step."""
    cores = pin()
    import jax.numpy as jnp
    import optax

    import jpeft
    from jpeft.train.losses import SUMS
    from jpeft.train.step import begin, make_step

    rate = matmul_rate(cores)
    made = adapted(model, name)
    trained = jpeft.summary(made).trainable
    graphdef, trainable, frozen = jpeft.partition(made)
    task = made.task
    del made
    tx = jpeft.optimizer(optax.adamw(RATE), model=graphdef)
    update = make_step(graphdef, SUMS[task], tx)
    held = [begin(tx, trainable)]
    batch = {key: jnp.asarray(x, "int32")[None] for key, x in batch_of(*MODELS[model]).items()}

    def run(steps: int) -> list[float]:
        def step() -> None:
            held[0], metrics = update(held[0], frozen, batch, None)
            metrics.loss.block_until_ready()

        return timed(step, steps)

    run(1)
    return {"compile": update.compile_seconds, "rate": rate, "trained": trained}, run


def prepare_latency(model: str, name: str) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """Measures how long jpeft's model takes to answer; there are no steps."""
    pin()
    from jpeft.train.compare.latency import latencies

    return {"latency_ms": latencies(adapted(model, name), MODELS[model][2])}, lambda steps: []


def prepare_peft(model: str, name: str) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """Builds it in transformers + peft, eager."""
    cores = pin()
    import torch
    import transformers
    from peft import get_peft_model

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    config = MODELS[model][0]
    causal = config["model_type"] == "llama"
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    hf = transformers.AutoConfig.for_model(**{key: v for key, v in config.items() if key != "architectures"})
    made: Any = auto.from_config(hf)
    method = peft_methods(config)[name]
    if method is not None:
        method.task_type = "CAUSAL_LM" if causal else "SEQ_CLS"
        made = get_peft_model(made, method)
    made.train()
    batch = {key: torch.from_numpy(value) for key, value in batch_of(*MODELS[model]).items()}
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=RATE)
    allocate = getattr(getattr(made, "base_model", None), "update_and_allocate", None) if name == "adalora" else None
    taken = [0]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        made(**batch).loss.backward()
        optimizer.step()
        taken[0] += 1
        if allocate is not None:
            allocate(taken[0])

    step()
    return {"compile": 0.0}, functools.partial(timed, step)


def timed(step: Callable[[], None], steps: int) -> list[float]:
    """Seconds of each of `steps` calls."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


#: Of `latency.latencies`, in the order of the table.
LATENCIES = ("adapted", "merged", "decode", "merged_decode")
PREPARE = {"jpeft": prepare_jpeft, "latency": prepare_latency, "peft": prepare_peft}


def measure(model: str, name: str, cores: list[int], steps: int, repeats: int) -> dict[str, Any]:
    """One method, beside PEFT's where it has one, with a LoRA step of jpeft's between to compare with."""
    asked = Side(__file__, "latency", f"{model}:{name}", cores)
    asked.close()
    sides = [Side(__file__, "jpeft", f"{model}:{kind}", cores) for kind in (name, "lora")]
    sides[1].name = "lora"
    if name in SHARED:
        sides.append(Side(__file__, "peft", f"{model}:{name}", cores))
    result: dict[str, Any] = take_turns(sides, steps, repeats)
    result |= sides[0].start | asked.start
    for side in sides:
        side.close()
    seconds = result["jpeft"]["seconds"]
    flops = step_flops(*MODELS[model]) * (1.5 if name == "full" else 1.0)
    result["share"] = flops / seconds / result["rate"]
    result["of_lora"] = seconds / result["lora"]["seconds"]
    result["of_peft"] = result["peft"]["seconds"] / seconds if name in SHARED else None
    return result


def line(name: str, result: dict[str, Any]) -> str:
    """The method's row of the table."""
    peft = f"{1000 * result['peft']['seconds']:.0f}" if name in SHARED else "-"
    ratio = f"{result['of_peft']:.2f}" if name in SHARED else "-"
    theirs = f"{result['peft']['peak_mb']:.0f}" if name in SHARED else "-"
    told = result["latency_ms"]
    answers = " | ".join("-" if told.get(key) is None else f"{told[key]:.1f}" for key in LATENCIES)
    return (
        f"| {name} | {result['trained']:,} | {1000 * result['jpeft']['seconds']:.0f} | {peft} | {ratio} | "
        f"{result['of_lora']:.2f} | {result['jpeft']['peak_mb']:.0f} | {theirs} | {result['compile']:.1f} | "
        f"{100 * result['share']:.0f} % | {answers} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=SHARED + OWN, help="all that have something to train")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    if options.worker:
        side, case = options.worker
        return serve(lambda: PREPARE[side](*case.split(":")))
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    print("| method | trained | ms | PEFT's ms | x PEFT's rate | of LoRA's time | peak MB | PEFT's | compile s | share "
          "| forward ms | merged | decode ms/token | merged |")  # fmt: skip
    print("|---" + 13 * "|---:" + "|")
    results = {}
    for name in options.methods or [name for name in SHARED + OWN if name not in refused(options.model)]:
        results[name] = measure(options.model, name, cores, options.steps, options.repeats)
        print(line(name, results[name]), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
