# SPDX-License-Identifier: Apache-2.0
"""The training program, and its parts for use from outside; each is imported when it is first named.

jpeft.train.step      the compiled update, and the losses `lm_loss`, `cls_loss`, `token_cls_loss`, `qa_loss`
jpeft.train.config    the typed configuration
jpeft.train.loop      `train(config)`, what `jpeft train` runs
"""

import importlib
from typing import Any

_MODULES = ("cli", "config", "data", "evaluate", "loop", "losses", "optim", "stdlib_docs", "step")


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
