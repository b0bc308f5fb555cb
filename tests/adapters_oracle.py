# SPDX-License-Identifier: Apache-2.0
"""What AdapterHub's `adapters` computed (tests/golden/make_adapters.py), and its names for jpeft's leaves."""

import functools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import trajectory
from contracts.table import QUICK

import jpeft

FOLDER = Path(__file__).parent / "golden"
FAMILIES = ("bert", "llama")

#: The library's names of the residual joins.
_JOINS = {
    "attention.output": "layers/attention/output/residual",
    "output": "layers/output/residual",
    "attention_adapters": "layers/attention_residual",
    "output_adapters": "layers/mlp_residual",
}
_JOIN = re.compile(
    r"(?:encoder\.layer|layers)\.(\d+)\.([a-z_.]+?)\.(?:adapters\.(\w)|adapter_fusion_layer\.([\w,]+))\.(.+)"
)
#: Its names of the leaves; a `weight` is transposed.
_LEAVES = {
    r"adapter_(down|up)(?:\.\d)?\.weight": r"\1",
    r"adapter_(down|up)(?:\.\d)?\.(?:bias|b)": r"\1_bias",
    r"adapter_(down|up)(?:\.\d)?\.W_(left|right)": r"\1_\2",
    r"adapter_norm_(before|after)\.weight": r"\1_scale",
    r"adapter_norm_(before|after)\.bias": r"\1_bias",
    r"gate\.(weight|bias)": r"gate_\1",
    r"(query|key|value)\.weight": r"\1",
    r"(query|key)\.bias": r"\1_bias",
    r"scaling": "scale",
    r"(F|G)\.0\.weight": r"\1_down",
    r"(F|G)\.2\.weight": r"\1_up",
    r"(F|G)\.0\.bias": r"\1_down_bias",
    r"(F|G)\.2\.bias": r"\1_up_bias",
    r"phm_rule": "rule",
    r"lora_(A|B)": r"\1",
    r"wte\.weight": "embedding",
    r"control_trans": "prefix",
    r"control_trans\.0\.weight": "down_kernel",
    r"control_trans\.2\.weight": "up_kernel",
    r"control_trans\.0\.bias": "down_bias",
    r"control_trans\.2\.bias": "up_bias",
}
#: Of prefixes and LoRAs, which stand in an attention.
_ATTENTION = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(?:attention\.self|self_attn)\.(.+)")
#: What jpeft calls the bottleneck `a` of the cases whose adapters have their kinds' names; "" where there is none.
KINDS = {"prefix": "", "prefix by a projection": "", "mam": "parallel_adapter", "unipelt": "pfeiffer"}
_POOL = "prefix_tuning.pool.prefix_tunings.a.self_prefix."


@functools.cache
def golden(family: str) -> dict[str, np.ndarray]:
    """All arrays of a model's file."""
    with np.load(FOLDER / f"adapters_{family}.npz") as file:
        return {name: file[name] for name in file.files}


def cases(family: str) -> list[str]:
    """The names of a file's cases."""
    return [name.removesuffix("/output") for name in golden(family) if name.endswith("/output")]


@functools.cache
def base(family: str) -> Any:
    """The plain model in jpeft."""
    arrays = golden(family)
    with tempfile.TemporaryDirectory() as folder:
        weights = {n.removeprefix("base/"): value for n, value in arrays.items() if n.startswith("base/")}
        safetensors.numpy.save_file(weights, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(json.loads(str(arrays["config"]))))
        return jpeft.models.load(folder, "FEATURE_EXTRACTION")


def place(name: str, case: str, fusion: str) -> tuple[str, int | None]:
    """(path of the leaf in jpeft, layer) for the library's name; fused adapters stand below the fusion."""
    attention = _ATTENTION.fullmatch(name)
    if attention and "adapters" not in name:
        return _in_attention(int(attention[1]), attention[2])
    joined = _JOIN.fullmatch(name)
    if joined:
        layer, join, adapter, _, leaf = joined.groups()
        owner = fusion if adapter is None else f"{fusion}/parts/{adapter}" if fusion else adapter
        return f"{_JOINS[join]}/adapters/{KINDS.get(case, owner)}/{_leaf(leaf)}", int(layer)
    kind, adapter, leaf = name.split(".", 2)
    where = {"shared_parameters": "", "invertible_adapters": "input_embedding/"}[kind]
    return f"{where}adapters/{adapter}/{_leaf(leaf)}", None


def _in_attention(layer: int, name: str) -> tuple[str, int | None]:
    """The same of a part of a hybrid, whose adapters have their kinds' names."""
    if name.startswith(_POOL):
        return f"adapters/prefix_tuning/{_leaf(name.removeprefix(_POOL))}", None
    if name.startswith("prefix_tuning.prefix_gates.a."):
        leaf = name.rpartition(".")[2]
        return f"layers/attention/self/keys_values/adapters/prefix_tuning/gate_{leaf}", layer
    projection, leaf = name.split(".loras.a.")
    return f"layers/attention/self/{projection}/adapters/lora/{_leaf(leaf)}", layer


def _leaf(name: str) -> str:
    found = [(p, to) for p, to in _LEAVES.items() if re.fullmatch(p, name)]
    assert len(found) == 1, name
    return re.sub(*found[0], name)


def leaves(family: str, case: str, kind: str, fusion: str = "") -> dict[str, list[tuple[int | None, np.ndarray]]]:
    """`{path: [(layer, array), ...]}` of a case's adapter; `kind` is `"leaf"` or `"grad"`."""
    found: dict[str, list[tuple[int | None, np.ndarray]]] = {}
    for name, value in _of(family, case, kind).items():
        path, layer = place(name, case, fusion)
        found.setdefault(path, []).append((layer, _laid(family, name, value)))
    return found


def _of(family: str, case: str, kind: str) -> dict[str, np.ndarray]:
    """A case's arrays of a kind by the library's name."""
    start = f"{case}/{kind}/"
    return {name.removeprefix(start): value for name, value in golden(family).items() if name.startswith(start)}


def _transposed(name: str) -> bool:
    return ("lora_" in name or name.endswith(".weight")) and ".wte." not in name


def _laid(family: str, name: str, value: np.ndarray) -> np.ndarray:
    """The library's array as jpeft lays it out in one layer."""
    if name.endswith("control_trans"):
        config = json.loads(str(golden(family)["config"]))
        places, d_head = 2 * config["num_hidden_layers"], config["hidden_size"] // config["num_attention_heads"]
        return value.reshape(3, places, -1, d_head)
    return value.T if _transposed(name) else value


def filled(model: Any, family: str, case: str, fusion: str = "") -> Any:
    """`model` with the case's weights; what the library has no weight for (padding, a layer left out) is zero."""
    graphdef, trainable, frozen = jpeft.partition(model)
    own = {path for path in frozen if "adapters/" in path} | set(trainable)
    new = {}
    for path, parts in leaves(family, case, "leaf", fusion).items():
        value = np.zeros({**frozen, **trainable}[path].shape, np.float32)
        for layer, part in parts:
            value[region(layer, part)] = part
        new[path] = jnp.asarray(value)
    assert set(new) == own
    pick = lambda half: {path: new.get(path, value) for path, value in half.items()}  # noqa: E731
    return jpeft.combine(graphdef, pick(trainable), pick(frozen))


def region(layer: int | None, part: np.ndarray) -> tuple[Any, ...]:
    """Where a layer's array stands in the stacked and padded leaf."""
    inner = tuple(slice(size) for size in part.shape)
    return inner if layer is None else (layer, *inner)


def run(model: Any, family: str, padded: bool = True) -> tuple[np.ndarray, dict[str, jax.Array]]:
    """(last hidden states at the tokens, gradients of the golden loss)."""
    arrays = golden(family)
    mask = arrays["mask"] if padded else np.ones_like(arrays["mask"])
    graphdef, trainable, frozen = jpeft.partition(model)

    def loss(trainable: Any) -> Any:
        out = jpeft.combine(graphdef, trainable, frozen)(arrays["ids"], mask)
        return (out * arrays["cotangent"] * mask[..., None]).sum(), out

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (_, out), gradients = step(trainable)
    return np.asarray(out)[mask == 1], gradients


def shrunk(model: Any) -> Any:
    """`model` with the leaves that a fusion's golden training starts from (`SHRUNK` of make_adapters.py)."""
    graphdef, trainable, frozen = jpeft.partition(model)
    return jpeft.combine(graphdef, {path: 0.125 * value for path, value in trainable.items()}, frozen)


def train(model: Any, family: str, padded: bool = True) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(losses, leaves after the last update) of the training that the golden one is."""
    arrays, rate = golden(family), trajectory.golden_rate(golden(family)["training"])
    mask = arrays["mask"] if padded else np.ones_like(arrays["mask"])
    batch = {"input_ids": arrays["ids"], "attention_mask": mask, "labels": arrays["cotangent"]}
    turned = {name: value[:, ::-1] for name, value in batch.items()}
    return trajectory.train(model, [batch, turned], rate, sums=_squares)


def _squares(model: Any, batch: Any, key: Any, groups: int) -> tuple[jax.Array, jax.Array]:
    """Sum over the tokens of the squares, and their number."""
    del key, groups
    seen = jnp.broadcast_to(batch["attention_mask"][..., None] == 1, batch["labels"].shape)
    out = model(batch["input_ids"], batch["attention_mask"])
    return jnp.square(jnp.where(seen, out - batch["labels"], 0)).sum(), seen.sum().astype(jnp.float32)


def trained_errors(trained: Any, family: str, case: str, fusion: str = "") -> dict[str, float]:
    """Of every weight that the library trained, how far the two numbers of it are off, relative to its norm."""
    errors, shapes = {}, _of(family, case, "leaf")
    for name, (norm, sines) in _of(family, case, "trained").items():
        path, layer = place(name, case, fusion)
        own = np.asarray(trained[path], np.float64)[region(layer, _laid(family, name, shapes[name]))]
        flat = (own.T if _transposed(name) else own).ravel()
        away = abs(np.linalg.norm(flat) - norm), abs(flat @ np.sin(np.arange(flat.size)) - sines)
        errors[name] = float(max(away) / norm)
    return errors


def expected(family: str, case: str, padded: bool = True) -> np.ndarray:
    """The library's last hidden states at the tokens."""
    output = golden(family)[f"{case}/output"]
    return output[golden(family)["mask"] == 1] if padded else output.reshape(-1, output.shape[-1])
