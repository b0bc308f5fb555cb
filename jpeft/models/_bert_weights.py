# SPDX-License-Identifier: Apache-2.0
"""The rules of the weights that BERT, RoBERTa and DeBERTa have in common: a layer's, a projection's, a norm's."""

from collections.abc import Iterable

from ._table import TRANSPOSE, Rule


def layer_rules(layer: str, projections: Iterable[str]) -> tuple[Rule, ...]:
    """Of the stack at `layers`, whose layers transformers calls `layer` and their self-attention's `projections`."""
    linears = {f"attention.self.{name}": f"attention/self/{name}" for name in projections}
    linears |= {
        "attention.output.dense": "attention/output/dense",
        "intermediate.dense": "intermediate/dense",
        "output.dense": "output/dense",
    }
    norms = {
        "attention.output.LayerNorm": "attention/output/residual/norm",
        "output.LayerNorm": "output/residual/norm",
    }
    return (
        *(rule for hf, path in linears.items() for rule in linear_rules(f"{layer}.{hf}", f"layers/{path}")),
        *(rule for hf, path in norms.items() for rule in norm_rules(f"{layer}.{hf}", f"layers/{path}")),
    )


def linear_rules(hf: str, path: str | None = None) -> tuple[Rule, Rule]:
    """Of a projection with a bias; by default both sides call it the same."""
    path = hf.replace(".", "/") if path is None else path
    return Rule(f"{hf}.weight", f"{path}/kernel", TRANSPOSE), Rule(f"{hf}.bias", f"{path}/bias")


def norm_rules(hf: str, path: str) -> tuple[Rule, Rule]:
    """Of a layer norm."""
    return Rule(f"{hf}.weight", f"{path}/scale"), Rule(f"{hf}.bias", f"{path}/bias")
