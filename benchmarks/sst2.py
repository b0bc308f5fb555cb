# SPDX-License-Identifier: Apache-2.0
"""Training on real sentences against `transformers` + `peft`: validation accuracy an epoch, and real tokens/s.

    JPEFT_DATA=path/to/data python benchmarks/sst2.py [--cores 2] [--seeds 0 1 2] [--epochs 3] [--rows N] [--json FILE]

SST-2 (`sst2/train_sentences.jsonl`, `sst2/validation.jsonl`), all-MiniLM-L6-v2, LoRA r=8 alpha=16 on query and value
with dropout 0.1, AdamW, lr 5e-4 falling linearly to 0, batches of 32 sentences. The sides run one after the other on
the same cores, each seed in a process of its own. peft's side is the usual loop: shuffled, padded to the longest of the
batch. A real token is one that is no padding; the time is that of the updates, without compilation on either side.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

from _sides import pin

from jpeft.train.program import HUGE_PAGES, VARIABLE

RATE, BATCH, LENGTH = 5e-4, 32, 128


def paths() -> tuple[str, str]:
    """The training and the validation file."""
    root = os.environ.get("JPEFT_DATA", "../shared/data")
    return f"{root}/sst2/train_sentences.jsonl", f"{root}/sst2/validation.jsonl"


def run_jpeft(seed: int, epochs: int, rows: int | None) -> dict[str, Any]:
    """The recipe, through the program's own loop."""
    pin()
    import tempfile

    from jpeft.train import config, loop
    from jpeft.train.demo import find_encoder

    folder = pathlib.Path(tempfile.mkdtemp())
    train, validation = paths()
    if rows:
        (folder / "few.jsonl").write_text("\n".join(pathlib.Path(train).read_text().splitlines()[:rows]))
        train = str(folder / "few.jsonl")
    tree = {
        "model": {"path": str(find_encoder()), "task": "SEQ_CLS"},
        "data": {"train": train, "eval": validation, "text": "sentence", "max_length": LENGTH},
        "method": {"kind": "lora", "rank": 8, "alpha": 16, "targets": ["query", "value"], "dropout": 0.1},
        "optimizer": {"lr": RATE, "schedule": "linear", "clip": None},
        "train": {"epochs": epochs, "batch_size": BATCH, "seed": seed},
        "out": str(folder / "run"),
    }
    result = loop.train(config.parse(tree))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [value for line in lines for name, value in line.items() if name in ("accuracy", "eval_accuracy")]
    return {"accuracy": found, "real_tokens_per_s": result.real_rate}


def run_peft(seed: int, epochs: int, rows: int | None) -> dict[str, Any]:
    """The same with peft, in eager torch."""
    cores = pin()
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from jpeft.train.demo import find_encoder

    torch.set_num_threads(cores)
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_encoder())
    base = transformers.AutoModelForSequenceClassification.from_pretrained(find_encoder(), num_labels=2)
    lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"])
    model = get_peft_model(base, lora)
    train, validation = ([json.loads(line) for line in pathlib.Path(path).read_text().splitlines()] for path in paths())
    train = train[:rows] if rows else train
    updates = epochs * -(-len(train) // BATCH)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / updates)

    def batch(chosen: list[Any]) -> Any:
        texts = [row["sentence"] for row in chosen]
        return tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")

    accuracies, seconds, tokens = [], 0.0, 0
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(train)).tolist()
        for start in range(0, len(train), BATCH):
            chosen = [train[i] for i in order[start : start + BATCH]]
            inputs, labels = batch(chosen), torch.tensor([row["label"] for row in chosen])
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
            schedule.step()
            seconds += time.perf_counter() - began
            tokens += int(inputs["attention_mask"].sum())
        model.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, len(validation), 64):
                chosen = validation[start : start + 64]
                predicted = model(**batch(chosen)).logits.argmax(-1).tolist()
                right += sum(p == row["label"] for p, row in zip(predicted, chosen, strict=True))
        accuracies.append(right / len(validation))
    return {"accuracy": accuracies, "real_tokens_per_s": tokens / seconds}


RUN = {"jpeft": run_jpeft, "peft": run_peft}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, help="only the first N training rows, for a quick look")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    if options.worker:
        side, seed = options.worker
        return print("RESULT " + json.dumps(RUN[side](int(seed), options.epochs, options.rows)))
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: options.cores]))
    environment = {
        VARIABLE: HUGE_PAGES,
        **os.environ,
        "JPEFT_BENCH_CORES": cores,
        "OMP_NUM_THREADS": str(options.cores),
    }
    results: dict[str, list[Any]] = {side: [] for side in RUN}
    for seed in options.seeds:
        for side in RUN:
            command = [sys.executable, __file__, "--worker", side, str(seed), "--epochs", str(options.epochs)]
            command += ["--rows", str(options.rows)] if options.rows else []
            said = subprocess.run(command, env=environment, capture_output=True, text=True)
            if said.returncode:
                sys.exit(f"the {side} side failed:\n{said.stderr[-2000:]}")
            result = json.loads(said.stdout.split("RESULT ")[-1])
            results[side].append(result)
            epochs = " ".join(f"{100 * a:.2f}" for a in result["accuracy"])
            print(
                f"{side:<6} seed {seed}: accuracy {epochs}; {result['real_tokens_per_s']:,.0f} real tokens/s",
                flush=True,
            )
    rates = {side: statistics.median(r["real_tokens_per_s"] for r in runs) for side, runs in results.items()}
    for side, runs in results.items():
        last = [100 * r["accuracy"][-1] for r in runs]
        spread = statistics.stdev(last) if len(last) > 1 else float("nan")
        print(f"{side:<6} last epoch {statistics.mean(last):.2f} ± {spread:.2f}; {rates[side]:,.0f} real tokens/s")
    print(f"{rates['jpeft'] / rates['peft']:.2f}x peft's real tokens/s")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
