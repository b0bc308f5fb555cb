# SPDX-License-Identifier: Apache-2.0
"""What a target can hold of an adapter, said before anything is written: PEFT, vLLM, AdapterHub's `adapters`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from .. import seams
from .._graft import grafts
from ._hub_union import members
from .adapters import check_adapters
from .peft import check_export

#: What `max_lora_rank` of vLLM may be, of which the first that is enough is to be passed; 16 is its default.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What keeps an adapter from a target, and what it would lose there.

    Attributes:
      target: `"peft"`, `"vllm"` or `"adapters"`.
      refused: why it cannot be written, or not be loaded there.
      lost: what would not be the same there.
      notes: what its user has to know there.
    """

    target: str
    refused: tuple[str, ...]
    lost: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.target}: {'cannot hold it' if self.refused else 'holds it'}"]
        for word, found in (("refused", self.refused), ("lost", self.lost), ("note", self.notes)):
            lines += [f"  {word}: {text}" for text in found]
        return "\n".join(lines)


def check(model: Any, target: str, name: str | None = None) -> Findings:
    """What `target` can hold of an adapter, without values being read.

    Args:
      model: with the adapter on it.
      target: `"peft"`, `"vllm"` or `"adapters"`.
      name: which adapter, or hybrid, where the model has several.

    Raises:
      ValueError: an unknown target; no adapter, or several and no `name`.

    Example:
      >>> print(jpeft.io.check(model, "vllm"))
    """
    if target not in _TARGETS:
        raise ValueError(f"target must be one of {', '.join(_TARGETS)}, got {target!r}")
    there = {own: module.adapters[own] for _, module in grafts(model) for own in module.adapters}
    if not there:
        raise ValueError("the model has no adapter to export; jpeft.adapt puts one on it")
    if name is not None and not _own(model, name):
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(there)}")
    return _TARGETS[target](model, name)


def _peft(model: Any, name: str | None) -> Findings:
    return Findings("peft", _said(check_export, model, name), _lost_anywhere(model, name), ())


def _adapters(model: Any, name: str | None) -> Findings:
    lost = [*_lost_anywhere(model, name)]
    for method in _methods(model, name):
        if getattr(method, "gate", False):
            lost.append("the gate is a mean over padding too there, so that a padded row gives another output")
        if method.kind == "lora" and method.gate:
            lost.append("the factor alpha / rank of a LoRA with a gate, which goes into its B")
        if method.kind == "direft":
            lost.append("DiReFT is written as the NoReFT that does the same; training goes on as that of a NoReFT")
        if method.kind in ("loreft", "noreft", "direft") and method.first and method.last:
            lost.append(
                f"in a prompt of fewer than {method.first + method.last} tokens the last ones win there, and here the "
                "nearer end"
            )
        if method.kind == "adapter_fusion" and method.dynamic and method.regularization not in (0, 0.01):
            lost.append(f"the regulariser's factor {method.regularization}, which is 0.01 there")
    return Findings("adapters", _said(check_adapters, model, name), tuple(dict.fromkeys(lost)), ())


def _vllm(model: Any, name: str | None) -> Findings:
    """vLLM reads PEFT's folders, of plain LoRA alone, with one rank and one factor for all modules."""
    refused, lost, notes = [*_said(check_export, model, name)], [*_lost_anywhere(model, name)], []
    for path, adapter in _parts(model, name):
        method: Any = adapter.method
        if adapter.saved_layers:
            refused.append(f"{path} is trained whole (modules_to_save or bias), and vLLM takes matrices A and B alone")
        if adapter.acts and method.kind == "lora" and not _is_matrix(model, path):
            notes.append(f"{path} is an embedding; vLLM takes it on the models that declare their embeddings for LoRA")
    for method in _methods(model, name):
        if method.kind != "lora":
            refused.append(f"the adapter is a {method.kind}, and vLLM serves LoRA alone")
            continue
        most = max([method.rank, *method.rank_pattern.values()]) * (2 if method.init in ("pissa", "olora") else 1)
        enough = [rank for rank in VLLM_RANKS if rank >= most]
        if not enough:
            refused.append(f"rank {most}, and vLLM goes up to {VLLM_RANKS[-1]}; jpeft.as_lora brings it to less")
        elif most > 16:
            notes.append(f"start vLLM with --max-lora-rank {enough[0]}; its default, 16, is less than rank {most}")
        if {*method.rank_pattern.values()} - {method.rank} or {*method.alpha_pattern.values()} - {method.alpha}:
            refused.append(
                "rank_pattern and alpha_pattern, which vLLM does not read: it scales all modules by the one alpha / r; "
                "jpeft.as_lora brings them to one rank"
            )
    if model.task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        refused.append(f"the head of a {model.task} model goes along (modules_to_save), which vLLM refuses")
    return Findings("vllm", tuple(dict.fromkeys(refused)), tuple(lost), tuple(notes))


_TARGETS: Mapping[str, Callable[[Any, str | None], Findings]] = {"peft": _peft, "vllm": _vllm, "adapters": _adapters}


def _said(rule: Callable[[Any, str | None], None], model: Any, name: str | None) -> tuple[str, ...]:
    """What a rule of export has against the adapter."""
    try:
        rule(model, name)
    except ValueError as error:
        return (str(error),)
    return ()


def _lost_anywhere(model: Any, name: str | None) -> tuple[str, ...]:
    """What no format keeps."""
    lost = []
    for method in _methods(model, name):
        if getattr(method, "projection", False) or method.kind == "p_tuning":
            lost.append("the network behind the virtual tokens: what it computes is written, to be trained alone")
        if getattr(method, "init", None) in ("pissa", "olora"):
            lost.append(f"the start by {method.init}: it is written as the LoRA of twice the rank that does the same")
    others = {own for _, module in grafts(model) for own in module.adapters} - _own(model, name)
    if name is not None and others:
        lost.append(f"the adapters {', '.join(sorted(others))}, which stay behind")
    return tuple(lost)


def _own(model: Any, name: str | None) -> set[str]:
    """The adapters that are meant: the one of that name, or those of the hybrid; without a name all."""
    there = {own for _, module in grafts(model) for own in module.adapters}
    return there if name is None else there & {name} or {*members(model, name)[1]}


def _parts(model: Any, name: str | None) -> list[tuple[str, Any]]:
    meant = _own(model, name)
    return [(path, a) for path, module in grafts(model) for own, a in module.adapters.items() if own in meant]


def _methods(model: Any, name: str | None) -> list[Any]:
    """The methods of the adapters, those that a fusion took over too."""
    whole = [adapter for _, adapter in _parts(model, name)]
    return list(dict.fromkeys(a.method for adapter in whole for a in (adapter, *adapter.parts.values())))


def _is_matrix(model: Any, path: str) -> bool:
    module = dict(grafts(model))[path]
    return isinstance(seams.projection(module), seams.Matmul)
