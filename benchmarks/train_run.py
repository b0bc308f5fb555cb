# SPDX-License-Identifier: Apache-2.0
"""Whole trainings against `transformers`' Trainer with `peft`, on the same machine and tokens.

    JPEFT_DATA=path/to/data python benchmarks/train_run.py [--cores 2] [--repeats 3] [--rows N] [--json FILE] [CASE ...]

  sst2      SST-2 sentences on all-MiniLM-L6-v2: batches of 32 rows; jpeft pads them to one of eight widths
  instruct  rasbt_instruction_1100 on a Llama of 12 layers, d=512, with GPT-2's vocabulary and random weights: batches
            of 8 examples; jpeft packs about as many tokens into rows of 512
  gsm8k     GSM8K's solutions on the same

Every training is a process of its own on the same cores, the sides in turns, one epoch, LoRA r=8 on queries and values.
The Trainer pads each batch to its longest row, as its collators do, and is given the tokens; jpeft makes them itself.
Both write a log line every 10 updates and save the adapter at the end. Of each side the medians of:

  rate     real tokens/s from the end of the first update to the end of the last, compilation left out
  wall     seconds from the start of the process to the end of training, for the same examples
  first    seconds from the start of the process to the end of the first update
  memory   most resident memory, in MB

and of jpeft what share of the time it waited for data, wrote log lines, and saved. At last jpeft's start is measured
without a compilation cache, with an empty one, and with the one that is then full.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from _sides import pin

from jpeft.train.program import HUGE_PAGES, VARIABLE

RATE, LENGTH, LOG_EVERY = 5e-4, {"sst2": 128, "instruct": 512, "gsm8k": 512}, 10
SIDES = ("jpeft", "trainer")
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50257, "hidden_size": 512,
    "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1376,
    "hidden_act": "silu", "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip


def settings(case: str, folder: pathlib.Path, out: str) -> Any:
    """jpeft's configuration."""
    from jpeft.train import config
    from jpeft.train.demo import find_encoder

    data = {"train": str(folder / "rows.jsonl"), "max_length": LENGTH[case]}
    if case == "sst2":
        model, rows = {"path": str(find_encoder()), "task": "SEQ_CLS"}, {"text": "sentence", "format": "sentence"}
        targets, batch = ["query", "value"], 32
    else:
        model = {"path": str(folder / "llama"), "task": "CAUSAL_LM"}
        rows = {"template": "alpaca", "packing": "best_fit"}
        targets, batch = ["q_proj", "v_proj"], 2 if case == "instruct" else 4
    return config.parse({
        "model": model, "data": {**data, **rows},
        "method": {"kind": "lora", "rank": 8, "alpha": 16, "targets": targets},
        "optimizer": {"lr": RATE, "clip": None},
        "train": {"epochs": 1, "batch_size": batch, "log_every": LOG_EVERY}, "out": out,
    })  # fmt: skip


def prepare(case: str, rows: int | None, folder: pathlib.Path) -> None:
    """Writes the rows, the model where it is a random one, and the tokens that jpeft makes of the rows."""
    root = pathlib.Path(os.environ.get("JPEFT_DATA", "../shared/data"))
    name = {"sst2": "sst2/train_sentences", "instruct": "instruct/rasbt_instruction_1100", "gsm8k": "gsm8k/train"}[case]
    lines = (root / f"{name}.jsonl").read_text().splitlines()[:rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    if case != "sst2":
        import jax

        import jpeft

        jpeft.models.save(jpeft.models.build(LLAMA, key=jax.random.key(0)), folder / "llama")
        for file in (root / "tokenizers/gpt2").iterdir():
            (folder / "llama" / file.name).write_bytes(file.read_bytes())
        (folder / "llama/tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<|endoftext|>"})
        )
    from jpeft.train import job

    examples = job.read_data(settings(case, folder, str(folder / "none"))).train.examples
    pairs = zip(examples.tokens, examples.labels, strict=True)
    (folder / "tokens.json").write_text(json.dumps([[t.tolist(), label.tolist()] for t, label in pairs]))


def run_jpeft(case: str, folder: pathlib.Path) -> dict[str, Any]:
    """The program's own loop."""
    pin()
    import jax

    from jpeft.train import loop, step

    first, call = [], step.Compiled.__call__

    def timed(self: Any, *arguments: Any) -> Any:
        out = call(self, *arguments)
        if not first:
            jax.block_until_ready(out[1].loss)
            first.append(time.time())
        return out

    setattr(step.Compiled, "__call__", timed)  # noqa: B010
    with tempfile.TemporaryDirectory() as out:
        result = loop.train(settings(case, folder, f"{out}/run"))
    shares = result.clock.shares()
    return {
        "rate": result.real_rate, "first": first[0], "end": time.time(), "loss": result.losses[-1],
        "data": shares["data"], "log": shares["log"], "save": shares["save"], "compile": result.clock.spent["compile"],
        "padding": 1 - result.real_rate / result.padded_rate,
    }  # fmt: skip


def run_trainer(case: str, folder: pathlib.Path) -> dict[str, Any]:
    """transformers' Trainer with peft."""
    cores = pin()
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from jpeft.train.demo import find_encoder

    torch.set_num_threads(cores)
    transformers.set_seed(0)
    classify = case == "sst2"
    if classify:
        path, kind = find_encoder(), transformers.AutoModelForSequenceClassification
        base, task, targets = kind.from_pretrained(path, num_labels=2), "SEQ_CLS", ["query", "value"]
    else:
        path, kind = folder / "llama", transformers.AutoModelForCausalLM
        base, task, targets = kind.from_pretrained(path), "CAUSAL_LM", ["q_proj", "v_proj"]
    model = get_peft_model(base, LoraConfig(task_type=task, r=8, lora_alpha=16, target_modules=targets))
    rows: Any = [{"ids": ids, "labels": labels} for ids, labels in json.loads((folder / "tokens.json").read_text())]
    seen = {"real": 0, "padded": 0}
    times: list[float] = []
    at_first: list[int] = []

    def collate(chosen: list[Any]) -> dict[str, torch.Tensor]:
        width = max(len(row["ids"]) for row in chosen)
        ids, mask = (torch.zeros(len(chosen), width, dtype=torch.long) for _ in range(2))
        labels = torch.full((len(chosen),) if classify else (len(chosen), width), -100)
        for at, row in enumerate(chosen):
            size = len(row["ids"])
            ids[at, :size], mask[at, :size] = torch.tensor(row["ids"]), 1
            if classify:
                labels[at] = row["labels"]
            else:
                labels[at, :size] = torch.tensor(row["labels"])
        seen["real"] += int(mask.sum())
        seen["padded"] += mask.numel()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class Times(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.time())
            if not at_first:
                at_first.append(seen["real"])

    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            out, per_device_train_batch_size=32 if classify else 8, num_train_epochs=1, learning_rate=RATE,
            max_grad_norm=0.0, logging_steps=LOG_EVERY, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Times()])
        trainer.train()
        model.save_pretrained(f"{out}/adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "rate": (seen["real"] - at_first[0]) / max(times[-1] - times[0], 1e-9), "first": times[0], "end": time.time(),
        "loss": losses[-1] if losses else float("nan"), "padding": 1 - seen["real"] / seen["padded"],
    }  # fmt: skip


RUN = {"jpeft": run_jpeft, "trainer": run_trainer}


def one(side: str, case: str, folder: pathlib.Path, cores: list[int], **environment: str) -> dict[str, float]:
    """One training in a process of its own; times count from its start."""
    variables = {
        VARIABLE: HUGE_PAGES, **os.environ, "JPEFT_BENCH_CORES": ",".join(map(str, cores)), "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": str(len(cores)), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **environment,
    }  # fmt: skip
    start = time.time()
    command = [sys.executable, __file__, "--worker", side, case, str(folder)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the {side} side failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.rpartition("RESULT ")[2])
    return {**found, "wall": found.pop("end") - start, "first": found["first"] - start}


def report(case: str, runs: dict[str, list[dict[str, float]]]) -> None:
    """Prints the medians."""
    medians = {s: {name: statistics.median(r[name] for r in runs[s]) for name in runs[s][0]} for s in SIDES}
    print(f"\n{case:<9}{'tokens/s':>10}{'wall s':>9}{'first s':>9}{'MB':>8}{'padding':>9}{'last loss':>11}")
    for side, found in medians.items():
        print(
            f"{side:<9}{found['rate']:>10,.0f}{found['wall']:>9.1f}{found['first']:>9.1f}{found['memory']:>8,.0f}"
            f"{100 * found['padding']:>8.1f}%{found['loss']:>11.4f}"
        )
    ours, theirs = (medians[side] for side in SIDES)
    print(
        f"{ours['rate'] / theirs['rate']:.2f}x the Trainer's real tokens/s, {theirs['wall'] / ours['wall']:.2f}x its "
        f"speed over all, {ours['memory'] / theirs['memory']:.2f} of its memory; jpeft waited for data "
        f"{100 * ours['data']:.2f} % of the time, wrote log lines {100 * ours['log']:.2f} %, saved "
        f"{100 * ours['save']:.2f} %, compiled {ours['compile']:.1f} s",
        flush=True,
    )


def starts(case: str, folder: pathlib.Path, cores: list[int]) -> dict[str, dict[str, float]]:
    """jpeft's start without a compilation cache, with an empty one, and with the full one."""
    with tempfile.TemporaryDirectory() as cache:
        variables = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        found = {
            "none": one("jpeft", case, folder, cores),
            "empty": one("jpeft", case, folder, cores, **variables),
            "full": one("jpeft", case, folder, cores, **variables),
        }
    for name, run in found.items():
        print(f"compilation cache {name:<6} first update after {run['first']:.1f} s, {run['compile']:.1f} s compiling")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="sst2, instruct, gsm8k; none is the first two")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "CASE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, help="only the first N rows, for a quick look")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    if options.worker:
        side, case, folder = options.worker
        found = RUN[side](case, pathlib.Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return print("RESULT " + json.dumps({**found, "memory": peak}))
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    results: dict[str, Any] = {}
    for case in options.cases or ("sst2", "instruct"):
        with tempfile.TemporaryDirectory() as place:
            folder = pathlib.Path(place)
            prepare(case, options.rows, folder)
            runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for repeat in range(options.repeats):
                for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
                    runs[side].append(one(side, case, folder, cores))
                    print(f"{case} {repeat + 1} {side}: {runs[side][-1]['rate']:,.0f} real tokens/s", flush=True)
            report(case, runs)
            results[case] = {"runs": runs, "starts": starts(case, folder, cores)}
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
