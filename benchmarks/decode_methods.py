# SPDX-License-Identifier: Apache-2.0
"""Cached greedy generation with every method beside PEFT's: same weights and adapters, same cores, float32, one run.

    python benchmarks/decode_methods.py [--cores 2] [--batch 8] [--new 64] [--repeats 5] [--methods lora ...] [--json F]

The model is a random Llama of 4 layers and d=256 with random adapters, made by jpeft and loaded by peft from what jpeft
exports. peft runs with transformers' default cache, its adapters beside the base as it serves them; jpeft too, and once
with LoRA merged. Prints, per method: tokens/s of both, their ratio, the time over that of jpeft's base alone, and the
share of tokens that both sides chose.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _sides import Side, pin, serve, take_turns
from decode import LLAMA, PROMPT, prompts, timed
from methods import methods

#: Without a form in PEFT, or nothing to adapt.
OWN = ("base", "lora, merged", "houlsby", "pfeiffer", "parallel", "compacter", "loreft")


def compared() -> dict[str, Any]:
    """Every method that leaves something beside the base, by its kind; None is the base alone."""
    import jpeft

    made = methods(["q_proj", "v_proj"]) | {
        "trainable_tokens": jpeft.TrainableTokens(token_indices=[37, 204, 185]),  # of this vocabulary
        "prefix_tuning": jpeft.PrefixTuning(num_tokens=20, shift_positions=True),  # PEFT's, with rotary positions
    }
    copies = ("full", "bitfit", "last_layers")
    beside = {name: method for name, method in made.items() if name not in copies}
    return {"base": None, "lora, merged": made["lora"]} | beside


def adapted(folder: str, name: str) -> Any:
    """The base with the method's adapter, whose leaves are away from their start; the same whoever asks."""
    import jax

    import jpeft

    model = jpeft.models.load(f"{folder}/base")
    method = compared()[name]
    if method is None:
        return model
    graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(model, method, key=jax.random.key(1)))
    keys = dict(zip(sorted(trainable), jax.random.split(jax.random.key(2), len(trainable)), strict=True))
    moved = {path: leaf + 0.02 * jax.random.normal(keys[path], leaf.shape) for path, leaf in trainable.items()}
    model = jpeft.combine(graphdef, moved, frozen)
    return jpeft.merge(model) if name.endswith("merged") else model


def prepare_jpeft(folder: str, name: str, batch: int, new: int) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """Adapts the model and compiles its program."""
    pin()
    from jpeft import models

    model = adapted(folder, name)
    ids = prompts(batch, model.config.vocab_size)

    def call() -> Any:
        return models.generate(model, ids, max_new_tokens=new, bucket=PROMPT).block_until_ready()

    return {"ids": call().tolist()}, timed(call)


def prepare_peft(folder: str, name: str, batch: int, new: int) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """What jpeft exported, in transformers + peft."""
    cores = pin()
    import peft
    import torch
    import transformers

    torch.set_num_threads(cores)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(base, f"{folder}/{name}").eval()
    base.generation_config.eos_token_id = None  # no row ends early, on no side
    ids = torch.tensor(prompts(batch, base.config.vocab_size))

    def call() -> Any:
        with torch.inference_mode():
            return model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
            )

    return {"ids": call()[:, -new:].tolist()}, timed(call)


PREPARE = {"jpeft": prepare_jpeft, "peft": prepare_peft}


def measure(folder: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One method: tokens/s of each side, and what belongs to them."""
    end = f"{options.batch}:{options.new}"
    names = ["jpeft", *(["peft"] if name not in OWN else [])]
    sides = [Side(__file__, side, f"{folder}:{name}:{end}", options.core_ids) for side in names]
    sides.append(Side(__file__, "jpeft", f"{folder}:base:{end}", options.core_ids))
    sides[-1].name = "base"
    try:
        found = take_turns(sides, options.steps, options.repeats)
    finally:
        for side in sides:
            side.close()
    row: dict[str, Any] = {side: options.batch * options.new / times["seconds"] for side, times in found.items()}
    row["of_base"] = found["jpeft"]["seconds"] / found["base"]["seconds"]
    if "peft" in found:
        ours, theirs = (side.start["ids"] for side in sides[:2])
        same = sum(a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
        row |= {"ratio": row["jpeft"] / row["peft"], "same": same / (options.batch * options.new)}
    return row


def line(name: str, row: dict[str, Any]) -> str:
    """The method's row of the table."""
    beside = f"{row['peft']:.0f} | {row['ratio']:.2f}" if "peft" in row else "- | -"
    same = f"{100 * row['same']:.0f} %" if "same" in row else "-"
    return f"| {name} | {row['jpeft']:.0f} | {beside} | {row['of_base']:.2f} | {same} |"


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=64, help="tokens a call")
    parser.add_argument("--steps", type=int, default=2, help="calls a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns a side")
    parser.add_argument("--methods", nargs="+", choices=compared(), default=list(compared()))
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    options.core_ids = sorted(os.sched_getaffinity(0))[: options.cores]
    print("| method | jpeft tokens/s | PEFT's | x PEFT's rate | of the base's time | same ids |")
    print("|---|---:|---:|---:|---:|---:|")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        import jax

        import jpeft

        jpeft.models.save(jpeft.models.build(LLAMA, "CAUSAL_LM", key=jax.random.key(0)), f"{folder}/base")
        for name in options.methods:
            if name not in OWN:
                jpeft.export_peft(adapted(folder, name), f"{folder}/{name}")
            results[name] = measure(folder, name, options)
            print(line(name, results[name]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        side, case = sys.argv[2:4]
        folder, name, batch, new = case.rsplit(":", 3)
        serve(lambda: PREPARE[side](folder, name, int(batch), int(new)))
    else:
        main()
