# SPDX-License-Identifier: Apache-2.0
"""Writes reft.npz: what AdapterHub's `adapters` 1.3.0 computes with LoReFT, NoReFT and DiReFT on a tiny BERT.

It needs an environment of its own, for `adapters` wants an older transformers:

  python3.11 -m venv env && env/bin/pip install torch==2.13.0 && env/bin/pip install adapters==1.3.0
  env/bin/python tests/golden/make_reft.py

The file holds the base's weights (`base/...`, by transformers' names), `ids` and `mask`, and for every case its
options, the units' R, W and b, the last hidden states, and the gradients of `(sines * tanh(states))[mask].sum()` with
respect to the three; that of LoReFT's R is of R itself, as if it were free. Of cases that are `trained`, also the
losses of a training by AdamW as `TRAINING` says, the mean of the squares of (sines - states) over the tokens, on the
inputs and on these with each row backwards in turn; and R, W and b afterwards. LoReFT's R is held in it: one step with
weight decay sets torch's to zero, and without, AdamW is another in torch's coordinates of R than in any others.
"""

import importlib
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.utils import parametrize

adapters = importlib.import_module("adapters")

CONFIG = {
    "vocab_size": 17, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 14,
    "max_position_embeddings": 12, "type_vocab_size": 2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
ROWS = ("111111110", "001111111", "111111111", "000111000")
TRAINING = {"updates": 20, "rate": 0.01, "betas": (0.9, 0.999), "eps": 1e-4, "decay": 0.05}
CASES = (
    {"method": "LoReFT", "rank": 1, "first": 3, "last": 0, "tied": True},
    {"method": "LoReFT", "rank": 3, "first": 2, "last": 2, "tied": True, "trained": True},
    {"method": "LoReFT", "rank": 2, "first": 2, "last": 3, "tied": False},
    {"method": "LoReFT", "rank": 2, "first": 1, "last": 1, "tied": False, "layers": [1]},
    {"method": "NoReFT", "rank": 2, "first": 2, "last": 1, "tied": True, "trained": True},
    {"method": "NoReFT", "rank": 2, "first": 1, "last": 2, "tied": False, "trained": True},
    {"method": "DiReFT", "rank": 2, "first": 3, "last": 1, "tied": True, "trained": True},
)


def main() -> None:
    torch.manual_seed(0)
    mask = np.array([[int(bit) for bit in row] for row in ROWS])
    ids = np.random.default_rng(0).integers(1, CONFIG["vocab_size"], mask.shape) * mask
    base = transformers.BertModel(transformers.BertConfig(**CONFIG)).eval()
    with torch.no_grad():
        for weight in base.parameters():
            weight.copy_(0.3 * torch.randn_like(weight))
    saved = {f"base/{name}": value.numpy().copy() for name, value in base.state_dict().items()}
    saved |= {"ids": ids, "mask": mask, "config": np.array(json.dumps(CONFIG))}
    saved["training"] = np.array(json.dumps(TRAINING))
    adapters.init(base)
    for i, case in enumerate(CASES):
        saved[f"{i}/case"] = np.array(json.dumps(case))
        saved |= {f"{i}/{name}": value for name, value in results(base, f"case{i}", case, ids, mask).items()}
    np.savez_compressed(Path(__file__).with_name("reft.npz"), **saved)


def results(model, name, case, ids, mask) -> dict[str, np.ndarray]:
    """Leaves `[layers, units, ...]`, states and gradients of one case."""
    config = getattr(adapters, f"{case['method'].replace('ReFT', 'Reft')}Config")(
        r=case["rank"],
        prefix_positions=case["first"],
        suffix_positions=case["last"],
        tied_weights=case["tied"],
        layers=case.get("layers", "all"),
        dropout=0.0,
    )
    model.add_adapter(name, config=config)
    model.set_active_adapters(name)
    model.eval()
    layers = [layer.reft_layer.refts[name].units for layer in model.encoder.layer if name in layer.reft_layer.refts]
    with torch.no_grad():
        for parameter_name, parameter in ((n, p) for units in layers for n, p in units.named_parameters()):
            noise = 0.3 * torch.randn_like(parameter)
            # Off its diagonal of -1 torch's parametrisation of R is lost: it rounds -0.999 towards 0.
            parameter.add_(torch.triu(noise, 1) if parameter_name.endswith("original") else noise)
    with parametrize.cached():  # so that R is one tensor, whose gradient can be asked for
        leaves = {
            "R": [[unit.projection.weight for unit in units] for units in layers],
            "W": [[unit.learned_source.weight for unit in units] for units in layers],
            "b": [[unit.learned_source.bias for unit in units] for units in layers],
        }
        out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
        sines = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).reshape(out.shape)
        loss = (sines * torch.tanh(out))[torch.tensor(mask) == 1].sum()
        flat = [leaf for rows in leaves.values() for row in rows for leaf in row]
        gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True))
    found = {"states": out.detach().numpy()}
    for leaf, rows in leaves.items():
        found[leaf] = stacked(rows)
        found[f"gradient of {leaf}"] = np.stack([np.stack([next(gradients).numpy() for _ in row]) for row in rows])
    if case.get("trained"):
        found |= training(model, layers, case["method"] == "LoReFT", ids, mask)
    return found


def stacked(rows) -> np.ndarray:
    """One array of those of all layers and units."""
    return np.stack([np.stack([value.detach().numpy() for value in row]) for row in rows])


def training(model, layers, held, ids, mask) -> dict[str, np.ndarray]:
    """Losses, and the leaves after the last update; `held` keeps R."""
    weights = [p for units in layers for n, p in units.named_parameters() if not (held and "projection" in n)]
    optimizer = torch.optim.AdamW(
        weights, TRAINING["rate"], TRAINING["betas"], TRAINING["eps"], weight_decay=TRAINING["decay"]
    )
    batches = [torch.tensor(np.stack([ids, mask])), torch.tensor(np.stack([ids, mask])).flip(-1)]
    losses = []
    for number in range(TRAINING["updates"]):
        ids, mask = batches[number % 2]
        optimizer.zero_grad()
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state
        sines = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).reshape(out.shape)
        loss = ((out - sines) ** 2)[mask == 1].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    leaves = {
        "R": [[unit.projection.weight for unit in units] for units in layers],
        "W": [[unit.learned_source.weight for unit in units] for units in layers],
        "b": [[unit.learned_source.bias for unit in units] for units in layers],
    }
    return {"losses": np.array(losses), **{f"trained {leaf}": stacked(rows) for leaf, rows in leaves.items()}}


if __name__ == "__main__":
    main()
