# SPDX-License-Identifier: Apache-2.0
"""One train step of every method, and of PEFT's where it has the method: same model, same cores, float32, one run.

    python benchmarks/methods.py [--cores 2] [--steps 3] [--repeats 5] [--methods lora dora ...] [--json FILE]

The model is MiniLM's shape (22.7M parameters) as a classifier, on 16 rows of 64 tokens; forward, loss, backward, AdamW.
Prints, per method: milliseconds a step, the ratio to PEFT's step, to jpeft's own LoRA step and to full fine-tuning's,
peak memory, compile time, trained parameters, and the share of the machine's measured matmul rate that the base's own
FLOPs (frozen: 4 N; full fine-tuning: 6 N) come to.
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
from step import MINILM, batch_of, matmul_rate, step_flops

BATCH, SEQ, RATE = 16, 64, 1e-4
QV = ["query", "value"]
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


def peft_methods() -> dict[str, Any]:
    """PEFT's configurations of the same."""
    import peft as p

    prompt: dict[str, Any] = {"num_virtual_tokens": 20}
    return {
        "lora": p.LoraConfig(r=8, lora_alpha=16, target_modules=QV),
        "dora": p.LoraConfig(r=8, lora_alpha=16, target_modules=QV, use_dora=True),
        "adalora": p.AdaLoraConfig(init_r=12, target_r=8, target_modules=QV, tinit=1, tfinal=1, total_step=1000),
        "loha": p.LoHaConfig(r=8, alpha=16, target_modules=QV),
        "lokr": p.LoKrConfig(r=8, alpha=16, target_modules=QV),
        "vera": p.VeraConfig(r=256, target_modules=QV),
        "oft": p.OFTConfig(oft_block_size=32, r=0, target_modules=QV),
        "fourierft": p.FourierFTConfig(n_frequency=1000, target_modules=QV),
        "ia3": p.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        "norm_tuning": p.LNTuningConfig(target_modules=["LayerNorm"]),
        "trainable_tokens": p.TrainableTokensConfig(token_indices=PHRASE, target_modules=["word_embeddings"]),
        "prompt_tuning": p.PromptTuningConfig(**prompt),
        "p_tuning": p.PromptEncoderConfig(encoder_hidden_size=384, **prompt),
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


def prepare_jpeft(name: str) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """Builds the method's model in jpeft and compiles its step."""
    cores = pin()
    import jax
    import jax.numpy as jnp
    import optax

    import jpeft
    from jpeft.train.losses import SUMS
    from jpeft.train.step import begin, make_step

    rate = matmul_rate(cores)
    model = jpeft.models.build(MINILM, key=jax.random.key(0))
    model = jpeft.adapt(model, methods(QV)[name], key=jax.random.key(1))
    trained = jpeft.summary(model).trainable
    graphdef, trainable, frozen = jpeft.partition(model)
    task = model.task
    del model
    tx = jpeft.optimizer(optax.adamw(RATE), model=graphdef)
    update = make_step(graphdef, SUMS[task], tx)
    held = [begin(tx, trainable)]
    batch = {key: jnp.asarray(x, "int32")[None] for key, x in batch_of(MINILM, BATCH, SEQ).items()}

    def run(steps: int) -> list[float]:
        def step() -> None:
            held[0], metrics = update(held[0], frozen, batch, None)
            metrics.loss.block_until_ready()

        return timed(step, steps)

    run(1)
    return {"compile": update.compile_seconds, "rate": rate, "trained": trained}, run


def prepare_peft(name: str) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """Builds it in transformers + peft, eager."""
    cores = pin()
    import torch
    import transformers
    from peft import get_peft_model

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    hf = transformers.AutoConfig.for_model(**{key: v for key, v in MINILM.items() if key != "architectures"})
    model: Any = transformers.AutoModelForSequenceClassification.from_config(hf)
    method = peft_methods()[name]
    if method is not None:
        method.task_type = "SEQ_CLS"
        model = get_peft_model(model, method)
    model.train()
    batch = {key: torch.from_numpy(value) for key, value in batch_of(MINILM, BATCH, SEQ).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None) if name == "adalora" else None
    taken = [0]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
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


PREPARE = {"jpeft": prepare_jpeft, "peft": prepare_peft}


def measure(name: str, cores: list[int], steps: int, repeats: int) -> dict[str, Any]:
    """One method, beside PEFT's where it has one, with a LoRA step of jpeft's between to compare with."""
    sides = [Side(__file__, "jpeft", name, cores), Side(__file__, "jpeft", "lora", cores)]
    sides[1].name = "lora"
    if name in SHARED:
        sides.append(Side(__file__, "peft", name, cores))
    result: dict[str, Any] = take_turns(sides, steps, repeats)
    result |= sides[0].start
    for side in sides:
        side.close()
    seconds = result["jpeft"]["seconds"]
    flops = step_flops(MINILM, BATCH, SEQ) * (1.5 if name == "full" else 1.0)
    result["share"] = flops / seconds / result["rate"]
    result["of_lora"] = seconds / result["lora"]["seconds"]
    result["of_peft"] = result["peft"]["seconds"] / seconds if name in SHARED else None
    return result


def line(name: str, result: dict[str, Any]) -> str:
    """The method's row of the table."""
    peft = f"{1000 * result['peft']['seconds']:.0f}" if name in SHARED else "-"
    ratio = f"{result['of_peft']:.2f}" if name in SHARED else "-"
    return (
        f"| {name} | {result['trained']:,} | {1000 * result['jpeft']['seconds']:.0f} | {peft} | {ratio} | "
        f"{result['of_lora']:.2f} | {result['jpeft']['peak_mb']:.0f} | {result['compile']:.1f} | "
        f"{100 * result['share']:.0f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "METHOD"), help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=SHARED + OWN, default=list(SHARED + OWN))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    if options.worker:
        side, name = options.worker
        return serve(lambda: PREPARE[side](name))
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    print("| method | trained | ms | PEFT's ms | x PEFT's rate | of LoRA's time | peak MB | compile s | share |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    results = {}
    for name in options.methods:
        results[name] = measure(name, cores, options.steps, options.repeats)
        print(line(name, results[name]), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
