# SPDX-License-Identifier: Apache-2.0
"""The side of `transformers` and `peft` in `benchmarks/gpu.py`: sdpa, bfloat16, compiled and not."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from _gpu_cases import RANK, RATE, documents, prompts
from peft import LoraConfig, get_peft_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Error = torch.cuda.OutOfMemoryError


def timed(call: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each of `times` calls, after two that are not counted."""
    seconds = []
    for _ in range(times + 2):
        start = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def peak_gib() -> float | None:
    """The most of the device that tensors ever took; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None


def build(config: dict[str, Any]) -> Any:
    """A random model in bfloat16 on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def train(case: dict[str, Any], steps: int, *, compiled: bool) -> dict[str, Any]:
    """Updates of LoRA or of everything, with gradient checkpointing where they do not fit without."""
    for checkpointing in (False, True):
        try:
            return _train(case, steps, compiled, checkpointing) | {"remat": "full" if checkpointing else "none"}
        except Error as error:
            print(f"checkpointing={checkpointing} does not fit: {str(error)[:200]}", flush=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    raise MemoryError("the step does not fit the device, checkpointed or not")


def _train(case: dict[str, Any], steps: int, compiled: bool, checkpointing: bool) -> dict[str, Any]:
    model = build(case["config"])
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case["method"] == "lora":
        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    model.train()
    call = torch.compile(model) if compiled else model
    batch = documents(case)
    ids = torch.from_numpy(batch["input_ids"]).long().to(DEVICE)
    positions = torch.from_numpy(batch["positions"]).long().to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=DEVICE == "cuda")

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        call(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
        optimizer.step()

    start = time.perf_counter()
    one()
    return {"compile": time.perf_counter() - start, "seconds": timed(one, steps), "peak_gib": peak_gib()}


def decode(case: dict[str, Any], steps: int, *, cache: str | None) -> dict[str, Any]:
    """Greedy generation with transformers' default cache, or with a static one, whose step it compiles."""
    model = build(case["config"]).eval()
    model.generation_config.eos_token_id = None  # no row ends early, on no side
    ids = torch.from_numpy(prompts(case)).long().to(DEVICE)
    told = {"max_new_tokens": case["new"], "do_sample": False, "pad_token_id": 0}
    if cache is not None:
        told["cache_implementation"] = cache

    def call() -> None:
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **told)

    start = time.perf_counter()
    call()
    return {"compile": time.perf_counter() - start, "seconds": timed(call, steps), "peak_gib": peak_gib()}


SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    "eager": functools.partial(train, compiled=False),
    "compiled": functools.partial(train, compiled=True),
    "default cache": functools.partial(decode, cache=None),
    "static cache": functools.partial(decode, cache="static"),
}


def versions() -> dict[str, str]:
    """What ran."""
    import peft

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
