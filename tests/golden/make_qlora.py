# SPDX-License-Identifier: Apache-2.0
"""Writes qlora.npz: twenty steps of QLoRA by peft 0.21.2 on bitsandbytes 0.50.2, on the folder stored/nf4.

It needs the environment of make_stored.py with peft==0.21.2 beside it.

The file holds the ids of every step, A and B of every adapted module at the start, by its name, and the loss before
each step of AdamW.
"""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
STEPS, RATE = 20, 1e-2


def main() -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(HERE / "stored" / "nf4", device_map="cpu")
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
    rng = np.random.default_rng(0)
    for name, factor in factors.items():
        draw = rng.standard_normal(factor.shape) * (0.1 if "lora_A" in name else 0.02)
        factor.data = torch.tensor(draw, dtype=torch.float32)
    saved = {name.removeprefix("base_model.model."): p.detach().numpy().copy() for name, p in factors.items()}
    optimizer = torch.optim.AdamW(factors.values(), lr=RATE, weight_decay=0.0)
    first = rng.integers(0, 32, (4, 1))  # each row counts on in steps of its own: something to learn
    ids = (first + rng.integers(1, 4, (STEPS, 4, 1)) * np.arange(12)) % 32
    losses = []
    model.train()
    for batch in torch.tensor(ids):
        logits = model(batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 32).float(), batch[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.savez_compressed(HERE / "qlora.npz", ids=ids, losses=np.array(losses), rate=RATE, **saved)


if __name__ == "__main__":
    main()
