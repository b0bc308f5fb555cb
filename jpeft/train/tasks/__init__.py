# SPDX-License-Identifier: Apache-2.0
"""What a model is measured by: one file a task, with its data, prompt or columns, metric and published figures.

A task is a `Classify`, a `Write` or a `Likelihood` (`kinds`); `running` measures a model by one.
"""

import importlib
from typing import Any

#: Tasks by name: where each is defined, and in a word what it is.
TASKS = {
    "sst2": ("sst2", "TASK", "sentiment of a sentence"),
    "imdb": ("imdb", "TASK", "sentiment of a review"),
    "pubmedqa": ("pubmedqa", "TASK", "yes, no or maybe to a biomedical question"),
    "mrpc": ("mrpc", "TASK", "whether two sentences say the same"),
    "pets": ("pets", "TASK", "breeds of cats and dogs on images"),
    "images": ("images", "TASK", "classes of any images, --data"),
    "gsm8k": ("gsm8k", "TASK", "school mathematics"),
    "math500": ("math500", "TASK", "competition mathematics"),
    "aime24": ("aime", "AIME24", "whole numbers, 2024"),
    "aime25": ("aime", "AIME25", "whole numbers, 2025"),
    "humaneval": ("humaneval", "TASK", "Python functions, run in a sandbox"),
    "summarisation": ("summarisation", "TASK", "ROUGE-L, BLEU, chrF"),
    "translation": ("translation", "TASK", "BLEU, chrF"),
    "dialogue": ("dialogue", "TASK", "ROUGE-L, BLEU, chrF"),
    "perplexity": ("perplexity", "TASK", "of plain text"),
}


def find(name: str) -> Any:
    """The task of a name.

    Raises:
      ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"no task is called {name!r}; there are {', '.join(TASKS)}")
    module, attribute, _ = TASKS[name]
    return getattr(importlib.import_module(f".{module}", __name__), attribute)
