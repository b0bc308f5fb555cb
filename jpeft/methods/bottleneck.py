# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters: a small two-layer network where a block's output meets the residual stream.

With h the output of a block, x the stream, and A(z) = s * (act(z down + b) up + c), down [d_model, m], up [m, d_model]:

    post-norm models                     pre-norm models        where
    Houlsby    norm(A(h) + h + x)        A(h) + h + x           after attention and MLP
    Pfeiffer   norm(A(z) + h + x)        A(h + x) + h + x       after the MLP; z = norm(h + x), by the same norm
    parallel   norm(A(x) + h + x)        A(x) + h + x           beside the MLP

The options are those of AdapterHub's `BnConfig` under their own names, and mean what they do there.
"""

import dataclasses
from typing import Any, ClassVar

from ._bottleneck import Bottleneck


@dataclasses.dataclass(frozen=True)
class Houlsby(Bottleneck):
    """Adapters after attention and MLP that read the block's output (Houlsby et al. 2019, arXiv 1902.00751).

    Args:
      reduction_factor: the width is `d_model // reduction_factor`, at least 1; or `{layer: factor, "default": factor}`.
      non_linearity: `"relu"`, `"gelu"`, `"gelu_new"`, `"swish"`, `"tanh"`, `"sigmoid"`, `"leakyrelu"` or `"linear"`.
      blocks: which blocks of a layer: `"attention"`, `"mlp"`, `"cross_attention"`.
      scaling: a factor of the output, or `"learned"` (a scalar per place) or `"channel"` (a vector), both from 1.
      dropout: probability of dropping an entry of the output while training.
      init: `"bert"` (normal, std 0.02), `"mam"` (down as torch's linears, up zero: starts as the base) or `"houlsby"`
        (normal, std 0.01, cut at two of them); biases are zero.
      gate: multiply the output by UniPELT's gate, one number per example (Mao et al. 2022); of encoders alone, as the
        mean over the text would make a causal model look ahead.
      ln_before, ln_after: a layer norm of the adapter's own on what it reads, or on its output.
      adapter_residual_before_ln: with `ln_after`, norm the sum of output and residual instead.
      original_ln_before: read norm(h + x) instead of h.
      original_ln_after: add x and norm afterwards, as the model does; else the adapter's output goes on as it is.
      residual_before_ln: with `original_ln_before`, what the output is added to: True for h, False for what the
        adapter reads, `"post_add"` for h + x.
      cross: adapt the decoder's cross-attention too.
      invertible: `"nice"` for a coupling of the two halves of the embedded input (MAD-X, Pfeiffer et al. 2020); where
        the head is tied to the embedding it is refused.
      invertible_reduction_factor: its inner width is `d_model / 2 // invertible_reduction_factor`.
      layers: indices of the layers to adapt; None for all.
      leave_out: indices of layers not to adapt.
      modules_to_save: modules trained whole, as a copy; None trains the head of a classification task, () nothing.

    Example:
      >>> jpeft.Houlsby(reduction_factor=16)
    """

    kind: ClassVar[str] = "houlsby"

    non_linearity: str = "swish"
    blocks: Any = ("attention", "mlp")


@dataclasses.dataclass(frozen=True)
class Pfeiffer(Bottleneck):
    """Adapters after the MLP alone that read the normed stream (Pfeiffer et al. 2021, arXiv 2005.00247).

    Options as of `Houlsby`. Of a post-norm model the base's norm acts twice: on what the adapter reads, and at the end.

    Example:
      >>> jpeft.Pfeiffer(reduction_factor={0: 8, "default": 16}, leave_out=[11])
    """

    kind: ClassVar[str] = "pfeiffer"

    original_ln_before: bool = True


@dataclasses.dataclass(frozen=True)
class ParallelAdapter(Bottleneck):
    """Adapters beside the MLP that read its input, from zero (He et al. 2022, arXiv 2110.04366).

    Options as of `Houlsby`, but for `original_ln_before` and the residuals, which it has not. In a pre-norm model it
    reads the residual stream before the norm.

    Example:
      >>> jpeft.ParallelAdapter(scaling="learned")
    """

    kind: ClassVar[str] = "parallel_adapter"
    PARALLEL: ClassVar[bool] = True

    reduction_factor: Any = 2
    scaling: Any = 4.0
    init: str = "mam"
