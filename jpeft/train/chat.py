# SPDX-License-Identifier: Apache-2.0
"""A conversation with a model and its adapters: messages made text by a template, answers as they come.

All adapters lie in one bank, so another one is another argument of the same compiled program.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import models
from .._bank import bank, select
from ..io import import_peft
from ..models._hub import adapter_folder, model_folder
from . import templates, tokenizer
from .writer import Writer

#: The name of the model without any adapter.
BASE = "base"


class Conversation:
    """Messages so far, and who answers.

    Attributes:
      names: of those who can answer, `BASE` first.
      speaker: the one of them who answers next.
      messages: `{"role": ..., "content": ...}` in order.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        system: str | None = None,
        template: str | None = None,
    ):
        """Loads a model folder and PEFT folders by name; ids on the hub will do.

        Args:
          model: the folder.
          adapters: by name.
          system: message that stands before the conversation.
          template: as `data.template`, for all; None takes the one beside each adapter, and where there is none the
            tokenizer's own.

        Raises:
          ValueError: there is no chat template; the adapters do not fit one bank; a name is taken.
          FileNotFoundError, CheckpointError: a folder is not there, or not right.
        """
        adapters = {} if adapters is None else adapters
        if BASE in adapters:
            raise ValueError(f"{BASE} is the name of the model without an adapter; give {adapters[BASE]} another")
        model = model_folder(model)
        self._words = tokenizer.load(model)
        self._names = {name: template or templates.beside(adapter_folder(at)) for name, at in adapters.items()}
        self._given = template
        self.names, self.speaker, self.system = (BASE, *adapters), [*adapters, BASE][0], system
        self._template = self._template_of(self.speaker)
        self._ends = tokenizer.ends(model, self._words)
        self._base = models.load(model, "CAUSAL_LM")
        adapted = [import_peft(self._base, folder) for folder in adapters.values()]
        self._bank = bank(adapted) if adapted else None
        self.reset()

    def switch(self, name: str) -> None:
        """Another one answers from now on; what was said stays.

        Raises:
          ValueError: there is none of this name, or no template for it.
        """
        if name not in self.names:
            raise ValueError(f"no adapter is called {name!r}; there are {', '.join(self.names)}")
        self._template = self._template_of(name)
        self.speaker = name

    def _template_of(self, name: str) -> templates.Template:
        return templates.load(self._words, self._names.get(name, self._given))

    def reset(self) -> None:
        """Forgets what was said, but for the system's message."""
        self.messages: list[dict[str, str]] = (
            [] if self.system is None else [{"role": "system", "content": self.system}]
        )

    def answer(self, text: str, **options: Any) -> Iterator[str]:
        """The answer piece by piece; once it is given, both are part of the conversation.

        Args:
          text: what the user says.
          **options: of `Writer.stream`.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        for ((piece,),) in self._writer().stream([self.prompt(asked)], **options):
            answer += piece
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of messages, and of what stands before an answer; the template brings the special tokens itself."""
        return self._words.encode_plain(self._template(messages, generation=True))

    def _writer(self) -> Writer:
        if self._bank is None:
            return Writer(self._base, self._words, self._ends)
        model = self._bank.combine(*select(self._bank, self.names.index(self.speaker)))
        return Writer(model, self._words, self._ends)
