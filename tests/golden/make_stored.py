# SPDX-License-Identifier: Apache-2.0
"""Writes stored/ and stored.npz: a tiny Llama in codes, as transformers saves it with bitsandbytes; AWQ, GPTQ tensors.

It needs the environment of make_bnb.py with transformers==5.23.0 and accelerate beside it, and of autoawq 0.2.9's
sources one file, `awq/utils/packing_utils.py`, as argument:

  env/bin/python tests/golden/make_stored.py packing_utils.py

For `nf4` (double quantization), `fp4` and `int8` the folder holds config.json and model.safetensors, and the file the
logits of ids 0 to 7 in two rows, and of some weights what bitsandbytes unpacks. Under `awq/` stand qweight, qzeros,
scales and what autoawq unpacks, `[d_in, d_out]`; under `gptq/` the same weight as autoawq repacks it for kernels that
read GPTQ's layout.
"""

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).parent / "stored"
#: Widths that blocks of 64 divide: in others bitsandbytes 0.50.2's kernel for CPUs takes some neighbours' magnitudes.
CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
)  # fmt: skip
CASES = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
#: Group size, inputs and outputs of the AWQ weight.
SIZE, D_IN, D_OUT = 32, 64, 24


def main(packing: str) -> None:
    saved = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(CONFIG).save_pretrained(folder)
        for name, how in CASES.items():
            model = LlamaForCausalLM.from_pretrained(
                folder, quantization_config=how, dtype=torch.float32, device_map="cpu"
            )
            shutil.rmtree(OUT / name, ignore_errors=True)
            model.save_pretrained(OUT / name)
            (OUT / name / "generation_config.json").unlink(missing_ok=True)
            saved |= {f"{name}/{key}": value for key, value in results(model, how).items()}
    saved |= packed(packing)
    np.savez_compressed(OUT.with_suffix(".npz"), **saved)


def results(model: torch.nn.Module, how: BitsAndBytesConfig) -> dict[str, np.ndarray]:
    import bitsandbytes.functional as bnb

    found = {}
    for i in range(CONFIG.num_hidden_layers):
        for name in ("q_proj", "down_proj"):
            layer = model.model.layers[i]
            weight = (layer.self_attn if name == "q_proj" else layer.mlp).get_submodule(name).weight
            plain = (
                bnb.dequantize_4bit(weight.data, weight.quant_state)
                if how.load_in_4bit
                else bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
            )
            found[f"{i}.{name}"] = plain.float().numpy()
    return found | {"logits": model(torch.arange(8).reshape(2, 4)).logits.detach().numpy()}  # which moves SCB away


def packed(file: str) -> dict[str, np.ndarray]:
    spec = importlib.util.spec_from_file_location("packing_utils", file)
    awq = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(awq)
    rng = np.random.default_rng(0)
    whole = rng.integers(-(2**31), 2**31, (D_IN, D_OUT // 8), np.int64).astype(np.int32)
    zeros = rng.integers(-(2**31), 2**31, (D_IN // SIZE, D_OUT // 8), np.int64).astype(np.int32)
    # Zeros of 1 and more: autoawq's repacking subtracts one without a carry, which 0 does not survive.
    nibbles = zeros.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    zeros = (np.maximum(nibbles, 1) << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1).astype(np.uint32).view(np.int32)
    scales = rng.uniform(0.01, 0.1, (D_IN // SIZE, D_OUT)).astype(np.float16)
    tensors = torch.tensor(whole), torch.tensor(zeros)
    found = dict(zip(("awq/qweight", "awq/qzeros"), (whole, zeros), strict=True)) | {"awq/scales": scales}
    found["awq/dequantized"] = awq.dequantize_gemm(*tensors, torch.tensor(scales), 4, SIZE).numpy()
    for name, value in zip(("qweight", "qzeros"), awq.unpack_reorder_pack(*tensors, 4), strict=True):
        found[f"gptq/{name}"] = value.numpy()
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(*sys.argv[1:])
