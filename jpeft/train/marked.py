# SPDX-License-Identifier: Apache-2.0
"""Rows whose labels are places in a text: words with a tag each, and answers that are a part of it.

{"tokens": ["Ada", "wrote"], "ner_tags": ["B-PER", "O"]}
{"question": "Who?", "context": "Ada wrote.", "answers": {"text": ["Ada"], "answer_start": [0]}}
"""

from collections.abc import Sequence
from typing import Any

from .items import Asked, Tagged
from .records import brief


def tagged(words: Any, tags: Any) -> Tagged:
    """Words and tags of one sentence.

    Raises:
      ValueError: they are no lists, not as many as each other, or a word is empty.
    """
    if not isinstance(words, Sequence) or isinstance(words, str) or not words:
        raise ValueError(f"its words must be a list of texts, got {brief(words)}")
    if not all(isinstance(word, str) and word.strip() for word in words):
        wrong = next(word for word in words if not isinstance(word, str) or not word.strip())
        raise ValueError(f"every word must be text that is not empty, got {brief(wrong)}")
    if not isinstance(tags, Sequence) or isinstance(tags, str) or len(tags) != len(words):
        got = f"{len(tags)}" if isinstance(tags, Sequence) and not isinstance(tags, str) else brief(tags)
        raise ValueError(f"it has {len(words)} words, and needs a list of as many tags, got {got}")
    return Tagged(tuple(words), tuple(tags))


def asked(question: str, context: str, answers: Any) -> Asked:
    """A question about a text, and the first of its answers.

    Args:
      question, context: texts.
      answers: `{"text": [...], "answer_start": [...]}` as SQuAD has it, or a list of `{"text", "answer_start"}`; with
        none in it the text does not answer the question.

    Raises:
      ValueError: they are of another make, or an answer does not stand where it is said to.
    """
    match answers:
        case {"text": [], "answer_start": []} | []:
            return Asked(question, context, None)
        case {"text": [str(text), *_], "answer_start": [int(start), *_]}:
            pass
        case [{"text": str(text), "answer_start": int(start)}, *_]:
            pass
        case _:
            raise ValueError(f"its answers must be {{'text': [...], 'answer_start': [...]}}, got {brief(answers)}")
    if not text:
        raise ValueError("its answer is empty")
    there = context[start : start + len(text)] if start >= 0 else ""
    if there != text:
        raise ValueError(
            f"its answer {brief(text)} is not at character {start} of the context, where {brief(there)} is"
        )

    return Asked(question, context, (start, start + len(text)))
