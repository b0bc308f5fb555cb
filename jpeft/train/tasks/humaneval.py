# SPDX-License-Identifier: Apache-2.0
"""HumanEval (Chen et al., 2021): 164 Python functions, written from their head and docstring, run against tests."""

import re
from collections.abc import Sequence

from ..sandbox.box import Problem, Sandbox
from ..scoring.intervals import means
from ..scoring.programs import each_pass_at_k, token_jaccard
from ..sections.data import Source
from .kinds import Row, Scored, Write

#: Of so many programs of a problem one is to pass.
_KS = (1, 5, 10, 100)
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def program(row: Row, text: str) -> str:
    """The whole program: what is written behind the prompt, or the fenced block where there is one."""
    block = _FENCE.search(text)
    if block is None:
        return row["prompt"] + text
    if re.search(rf"^def {re.escape(row['entry_point'])}\b", block.group(1), re.MULTILINE):
        head, _, _ = row["prompt"].partition(f"def {row['entry_point']}")  # imports, and what it may call
        return head + block.group(1)
    return row["prompt"] + block.group(1)


def problem(row: Row, source: str) -> Problem:
    """A program with its tests; what these call of the prompt stands beside them."""
    tests = f"{row['test']}\ncheck({row['entry_point']})"
    return Problem(source, row["entry_point"], tests, row["prompt"] + "    pass\n")


def score(rows: Sequence[Row], written: Sequence[Sequence[str]], seed: int) -> Scored:
    """pass@1, and pass@5, 10 and 100 where so many were drawn; token Jaccard with the published solution.

    Raises:
      Unconfined: there is no sandbox here.
    """
    box = Sandbox()
    layers = box.layers()
    sources = [[program(row, text) for text in texts] for row, texts in zip(rows, written, strict=True)]
    verdicts = box.judge_all([problem(row, s) for row, each in zip(rows, sources, strict=True) for s in each])
    examples = []
    for row, each in zip(rows, sources, strict=True):
        found = [next(verdicts) for _ in each]
        examples.append(
            {
                "task_id": row.get("task_id"),
                "passed": [verdict.passed for verdict in found],
                "outcome": [f"{verdict.outcome} {verdict.detail}".strip() for verdict in found],
                "jaccard": [token_jaccard(s, row["prompt"] + row["canonical_solution"]) for s in each],
            }
        )
    passed, drawn = [example["passed"] for example in examples], min(map(len, written))
    values = {f"pass@{k}": each_pass_at_k(passed, k) for k in _KS if k <= drawn}
    values["token_jaccard"] = [sum(example["jaccard"]) / len(example["jaccard"]) for example in examples]
    fenced = sum("```" in text for texts in written for text in texts)
    return Scored(means(values, seed=seed), examples, {"sandbox": layers, "fenced": fenced}, values)


TASK = Write(
    source=Source("openai/openai_humaneval", split="test"),
    prompt="{prompt}",
    stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint", "<|endoftext|>"),
    max_new_tokens=512,
    score=score,
    compared=(*(f"pass@{k}" for k in _KS), "token_jaccard"),
    extractor="the text behind the prompt up to a stop string, or the first fenced block",
    published={
        "Codex-12B": "pass@1 28.8, pass@10 46.8, pass@100 72.3 (Chen et al., 2021)",
        "Llama-2-7B, pass@1": "12.8 (Touvron et al., 2023)",
    },
)
