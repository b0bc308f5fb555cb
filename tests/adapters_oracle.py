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
}


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


def place(name: str, fusion: str) -> tuple[str, int | None]:
    """(path of the leaf in jpeft, layer) for the library's name; fused adapters stand below the fusion."""
    joined = _JOIN.fullmatch(name)
    if joined:
        layer, join, adapter, _, leaf = joined.groups()
        owner = fusion if adapter is None else f"{fusion}/parts/{adapter}" if fusion else adapter
        return f"{_JOINS[join]}/adapters/{owner}/{_leaf(leaf)}", int(layer)
    kind, adapter, leaf = name.split(".", 2)
    where = {"shared_parameters": "", "invertible_adapters": "input_embedding/"}[kind]
    return f"{where}adapters/{adapter}/{_leaf(leaf)}", None


def _leaf(name: str) -> str:
    found = [(p, to) for p, to in _LEAVES.items() if re.fullmatch(p, name)]
    assert len(found) == 1, name
    return re.sub(*found[0], name)


def leaves(family: str, case: str, kind: str, fusion: str = "") -> dict[str, list[tuple[int | None, np.ndarray]]]:
    """`{path: [(layer, array), ...]}` of a case's adapter; `kind` is `"leaf"` or `"grad"`."""
    found: dict[str, list[tuple[int | None, np.ndarray]]] = {}
    for name, value in golden(family).items():
        if name.startswith(f"{case}/{kind}/"):
            path, layer = place(name.removeprefix(f"{case}/{kind}/"), fusion)
            matrix = name.endswith(".weight") and value.ndim == 2
            found.setdefault(path, []).append((layer, value.T if matrix else value))
    return found


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

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    return np.asarray(out)[mask == 1], gradients


def expected(family: str, case: str, padded: bool = True) -> np.ndarray:
    """The library's last hidden states at the tokens."""
    output = golden(family)[f"{case}/output"]
    return output[golden(family)["mask"] == 1] if padded else output.reshape(-1, output.shape[-1])
