# SPDX-License-Identifier: Apache-2.0
"""Model folders of codes for tests: a tiny Llama's tensors read and written by name, and one in GPTQ's layout."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jpeft
from jpeft.models import _safetensors
from jpeft.models._safetensors import Source

HERE = Path(__file__).parent / "golden"
GOLDEN = np.load(HERE / "stored.npz")
IDS = np.arange(8).reshape(2, 4)
KEY = jax.random.key(0)
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All of a folder's tensors, by name."""
    words = _safetensors.FLOATS | _safetensors._CODES
    found = _safetensors.header(folder / "model.safetensors")
    return {
        name: _safetensors.read_bytes(tensor).view(words[tensor.dtype]).reshape(tensor.shape)
        for name, tensor in found.items()
    }


def write(folder: Path, values: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sources = {name: Source(value.shape, value.dtype, lambda value=value: value) for name, value in values.items()}
    _safetensors.write(folder / "model.safetensors", sources, {})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of numbers below 2^bits as int32, the first in the low bits: with Python's own integers."""
    per = 32 // bits
    words = [
        [sum(int(n) << bits * i for i, n in enumerate(row[j : j + per])) for j in range(0, len(row), per)]
        for row in numbers
    ]
    return np.array(words, np.uint32).view(np.int32)


def gptq_folder(
    folder: Path, bits: int = 4, form: str = "gptq", act: bool = False, size: int = 32, **said: Any
) -> tuple[Path, dict]:
    """A folder of random codes, and every weight `[d_out, d_in]` in float64 by the formula."""
    rng, expected = np.random.default_rng(bits), {}
    base = jpeft.models.build(CONFIG, key=KEY)
    jpeft.models.save(base, folder)
    values = tensors(folder)
    for name in [name for name in values if "_proj" in name]:
        d_out, d_in = values.pop(name).shape
        groups, start = 1 if size == -1 else -(-d_in // size), name.removesuffix("weight")
        rows = np.arange(d_in) // (d_in if size == -1 else size)
        rows = rng.permutation(rows) if act and "down" in name else rows
        codes, zeros = rng.integers(0, 2**bits, (d_in, d_out)), rng.integers(0, 2**bits, (groups, d_out))
        scales = rng.uniform(0.001, 0.01, (groups, d_out)).astype(np.float16)
        expected[name] = ((codes - zeros[rows]) * scales.astype(np.float64)[rows]).T
        kept = (zeros - 1) % 2**bits if form == "gptq" else zeros
        values |= {
            f"{start}qweight": packed(codes.T, bits).T, f"{start}qzeros": packed(kept, bits),
            f"{start}scales": scales, f"{start}g_idx": rows.astype(np.int32),
        }  # fmt: skip
    values = {name: np.ascontiguousarray(value) for name, value in values.items()}
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "checkpoint_format": form,
        "desc_act": act,
    } | said
    return write(folder, values, quantization_config=config), expected
