# SPDX-License-Identifier: Apache-2.0
"""The cases of `benchmarks/gpu.py`: what each side runs, at which sizes, and the same data for all of them."""

from typing import Any

import numpy as np

RANK, RATE = 16, 1e-4
#: Tokens of a packed document.
DOCUMENT = 1024

LLAMA = {"model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
LLAMA_8B = LLAMA | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_1B = LLAMA | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_01B = LLAMA | {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = LLAMA | {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip

#: A train step beside PEFT's or transformers', both compiled and not.
BESIDE = {"jpeft": ("jpeft", "train"), "eager": ("torch", "eager"), "compiled": ("torch", "compiled")}
#: Generation beside transformers', with either of its caches.
WRITING = {"jpeft": ("jpeft", "decode"), "default": ("torch", "default cache"), "static": ("torch", "static cache")}
MIXED = {"one a row": ("jpeft", "an adapter a row"), "one for all": ("jpeft", "one adapter")}
MANY = {"at once": ("jpeft", "at once"), "one by one": ("jpeft", "one by one")}
TEXT = {"prompt": 128, "new": 128}
PRODUCT = {"pallas": ("jpeft", "pallas"), "xla": ("jpeft", "xla")}

#: name -> title, sides (name -> process, function), sizes. A step handles `tokens` tokens.
CASES: dict[str, dict[str, Any]] = {
    "lora": {
        "title": "LoRA, Llama-3-8B", "sides": BESIDE, "config": LLAMA_8B, "method": "lora", "rows": 1, "seq": 4096,
    },
    "qlora": {
        "title": "QLoRA, Llama-3-8B", "sides": {"jpeft": BESIDE["jpeft"]}, "config": LLAMA_8B, "method": "lora",
        "scheme": "nf4_double", "rows": 1, "seq": 4096,
    },
    "qlora_2k": {
        "title": "QLoRA, Llama-3-8B, memory", "sides": {"jpeft": BESIDE["jpeft"]}, "config": LLAMA_8B,
        "method": "lora", "scheme": "nf4_double", "rows": 2, "seq": 2048, "remat": ("full",),
    },
    "full": {
        "title": "everything, Llama-3.2-1B", "sides": BESIDE, "config": LLAMA_1B, "method": "full",
        "rows": 1, "seq": 4096,
    },
    "decode_1": {"title": "writing, 1 row", "sides": WRITING, "config": LLAMA_8B, "rows": 1, **TEXT},
    "decode_32": {"title": "writing, 32 rows", "sides": WRITING, "config": LLAMA_8B, "rows": 32, **TEXT},
    "mixed": {"title": "writing, adapters mixed", "sides": MIXED, "config": LLAMA_1B, "rows": 32, **TEXT},
    "many": {"title": "16 adapters, 0.1B", "sides": MANY, "config": LLAMA_01B, "adapters": 16, "rows": 1, "seq": 512},
    **{
        f"product_{rows}": {
            "title": f"NF4 products, {rows} rows", "sides": PRODUCT, "rows": rows, "d_in": 4096, "d_out": 14336,
            "layers": 4, "scheme": "nf4_double",
        }
        for rows in (1, 32, 4096)
    },
}  # fmt: skip

#: What is asked: name -> (figure, over what, at least, in words).
AIMS: dict[str, list[tuple[str, float, str]]] = {
    "lora": [
        ("tokens_per_s", 12500, "tokens/s of jpeft, at least"),
        ("over_others", 1.5, "times the faster of peft's, at least"),
        ("memory", 1.0, "times peft's memory, at most"),
    ],
    "qlora": [("over_lora", 0.85, "times LoRA's tokens/s, at least")],
    "qlora_2k": [("peak_gib", 8.0, "GiB, at most")],
    "mixed": [("over_others", 0.9, "times one adapter's rate, at least")],
    "many": [("over_others", 4.0, "times the rate of one after another, at least")],
}


def sized(name: str, small: bool) -> dict[str, Any]:
    """A case, or the same in a size for a CPU."""
    case = {"name": name, **CASES[name]}
    if not small:
        return case
    least = {"seq": 128, "prompt": 16, "new": 8, "d_in": 128, "d_out": 256, "layers": 2, "adapters": 4}
    case = {key: min(value, least[key]) if key in least else value for key, value in case.items()}
    if name.startswith("product"):
        return case | {"rows": min(case["rows"], 64)}
    return case | {"config": SMALL, "rows": min(case["rows"], 4)}


def tokens(case: dict[str, Any]) -> int:
    """Tokens of a step: trained on, written, or rows multiplied."""
    if "new" in case:
        return case["rows"] * case["new"]
    if "seq" in case:
        return case["rows"] * case["seq"] * case.get("adapters", 1)
    return case["rows"] * case["layers"]


def documents(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Packed rows of random tokens, `[rows, seq]`: ids, labels, segments from 1 and positions in each."""
    shape = case["rows"], case["seq"]
    ids = np.random.default_rng(0).integers(3, case["config"]["vocab_size"], shape, dtype=np.int32)
    place = np.broadcast_to(np.arange(case["seq"], dtype=np.int32), shape)
    segments, positions = 1 + place // DOCUMENT, place % DOCUMENT
    mask = np.ones(shape, np.int32)
    return {"input_ids": ids, "labels": ids, "segment_ids": segments, "positions": positions, "attention_mask": mask}


def prompts(case: dict[str, Any]) -> np.ndarray:
    """Random ids `[rows, prompt]`, the same for every side."""
    shape = case["rows"], case["prompt"]
    return np.random.default_rng(0).integers(3, case["config"]["vocab_size"], shape, dtype=np.int32)
