# SPDX-License-Identifier: Apache-2.0
"""Ready hybrids: several methods under the name of the paper that put them together."""

from typing import Any

from ._method import Hybrid
from .methods import METHODS


def MAM(
    *,
    num_tokens: int = 30,
    hidden_size: int = 800,
    reduction_factor: float = 2,
    scaling: float = 4.0,
    layers: Any = None,
    modules_to_save: Any = None,
) -> Hybrid:
    """Mix-and-match (He et al. 2022, https://arxiv.org/abs/2110.04366): a prefix, and an adapter beside each MLP.

    Args:
      num_tokens, hidden_size: of the prefix, and the inner width of the projection that computes it.
      reduction_factor, scaling: of the adapter: d_model over its inner width, and the factor of its output.
      layers, modules_to_save: of both, as of `jpeft.LoRA`.

    Example:
      >>> model = jpeft.adapt(model, jpeft.MAM(), key=jax.random.key(0))
    """
    both = {"layers": layers, "modules_to_save": modules_to_save}
    return Hybrid(
        (
            _method("PrefixTuning", num_tokens=num_tokens, projection=True, hidden_size=hidden_size, **both),
            _method("ParallelAdapter", reduction_factor=reduction_factor, scaling=scaling, **both),
        )
    )


def UniPELT(
    *,
    rank: int = 8,
    alpha: float = 2,
    num_tokens: int = 10,
    hidden_size: int = 512,
    reduction_factor: float = 16,
    targets: Any = None,
    layers: Any = None,
    modules_to_save: Any = None,
) -> Hybrid:
    """UniPELT (Mao et al. 2022, https://arxiv.org/abs/2110.07577): LoRA, a prefix and an adapter, each with a gate.

    A gate is one number per example, so it looks at all of its text: causal language models are refused. LoRA's factor
    alpha / rank counts here; `adapters` leaves it out, so that its alpha of 2 does nothing (`alpha=8` does the same).

    Args:
      rank, alpha, targets: of LoRA.
      num_tokens, hidden_size: of the prefix, and the inner width of the projection that computes it.
      reduction_factor: of the adapter after each MLP: d_model over its inner width.
      layers, modules_to_save: of all three, as of `jpeft.LoRA`.

    Example:
      >>> model = jpeft.adapt(model, jpeft.UniPELT(), key=jax.random.key(0))
    """
    all_three = {"gate": True, "layers": layers, "modules_to_save": modules_to_save}
    return Hybrid(
        (
            _method("LoRA", rank=rank, alpha=alpha, targets=targets, **all_three),
            _method("PrefixTuning", num_tokens=num_tokens, projection=True, hidden_size=hidden_size, **all_three),
            _method("Pfeiffer", reduction_factor=reduction_factor, **all_three),
        )
    )


def _method(name: str, **fields: Any) -> Any:
    (method,) = (method for method in METHODS.values() if method.__name__ == name)
    return method(**fields)
