# SPDX-License-Identifier: Apache-2.0
"""How messages become text: the tokenizer's own chat template, or one of a few by name.

One function serves training and chatting, and an adapter has the template that it was trained with beside it, so that
a model is asked as it was taught.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models._files import is_file
from . import tokenizer as tokenizers
from .tokenizer import Tokenizer

#: Templates by name.
NAMED: Mapping[str, str] = {
    "chatml": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n{{ m.content }}"
        "{{ eos_token }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% elif m.role == 'user' %}"
        "### Instruction:\n{{ m.content }}\n\n"
        "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}
#: Tokens that a named template writes, each of which must be one of the vocabulary.
_WRITES = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
#: Stands before one of these where the tokenizer starts no text with its `bos_token`, so that nor does a conversation.
_WITHOUT_START = "{% set bos_token = '' %}"
#: The file that a folder's template stands in, as transformers reads and writes it.
FILE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class Template:
    """Messages -> text.

    Attributes:
      name: what it is called in messages.
      source: in jinja.
      tokens: the special tokens that it may write, by name, such as `bos_token`.
    """

    name: str
    source: str
    tokens: Mapping[str, str]

    def __call__(self, messages: Sequence[Mapping[str, str]], *, generation: bool = False) -> str:
        """The text of messages `{"role": ..., "content": ...}`, with what stands before an answer if `generation`.

        Raises:
          ValueError: the template refuses these messages.
        """
        import jinja2

        try:
            return _compiled(self.source).render(
                messages=list(messages), add_generation_prompt=generation, tools=None, documents=None, **self.tokens
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the template {self.name} refuses these messages: {error}") from error


def load(words: Tokenizer, name: str | None = None) -> Template:
    """A template for a model.

    Args:
      words: the tokenizer of its folder.
      name: one of `NAMED`; a file in jinja; or None for the tokenizer's own.

    Raises:
      ValueError: the tokenizer has none of its own; the name is unknown; a token that the template writes is none of
        the tokenizer's.
    """
    folder = words.folder
    theirs = tokenizers.auto_tokenizer(folder)
    tokens = {key: token for key, token in theirs.special_tokens_map.items() if isinstance(token, str)}
    if name is None:
        own = theirs.chat_template
        source = own.get("default") if isinstance(own, dict) else own
        if not source:
            raise ValueError(
                f"the tokenizer of {folder} has no chat template, so nothing says how messages become text; "
                f"name one by data.template ({', '.join(NAMED)}, or a file), or use a model that was made for chat"
            )
        return Template("of the tokenizer", source, tokens)
    if name not in NAMED:
        if not Path(name).is_file():
            raise ValueError(f"the template {name!r} is neither a file nor one of {', '.join(NAMED)}")
        return Template(name, Path(name).read_text(encoding="utf-8"), tokens)
    missing = [token for token in _WRITES.get(name, ()) if words.backend.token_to_id(token) is None]
    if missing:
        raise ValueError(
            f"the template {name} writes {missing[0]}, which is no token of {folder}; alpaca and plain need none"
        )
    if name not in _WRITES and not tokens.get("eos_token"):
        raise ValueError(f"the template {name} ends an answer with the tokenizer's eos_token, and {folder} has none")
    starts = words.starts_with(tokens.get("bos_token", ""))
    return Template(name, NAMED[name] if starts else _WITHOUT_START + NAMED[name], tokens)


def beside(folder: str | Path) -> str | None:
    """The template in an adapter's folder as `load` takes it; None where there is none."""
    file = Path(folder) / FILE
    return str(file) if is_file(file) else None


def asked(prompts: Sequence[str], words: Tokenizer, name: str | None) -> list[list[int]]:
    """Token ids of prompts as messages of a user's, with what stands before an answer. `words`, `name` as of `load`."""
    template = load(words, name)
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [words.encode_plain(template(talk, generation=True)) for talk in talks]


@functools.cache
def _compiled(source: str) -> Any:
    """A template in transformers' dialect of jinja, in a sandbox: it came with a model."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation(), loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is no jinja: {error}") from error


def _generation() -> Any:
    """The tag `{% generation %}`, which marks answers for others and here only shows them."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
