# SPDX-License-Identifier: Apache-2.0
"""Several choices in the place of a row: an encoder reads each as a row of its own, and its head gives one number."""

from typing import Any

import jax

#: The tasks that have one output per row, which a row of several examples could not have.
ONE_PER_ROW = ("SEQ_CLS", "MULTIPLE_CHOICE")


def rows(task: str, *inputs: Any) -> tuple[tuple[Any, ...], int | None]:
    """The inputs with `[batch, choices]` as one axis of rows, and how many choices there are; None of another task.

    Raises:
      ValueError: an input has another number of choices, or no axis of them.
    """
    if task != "MULTIPLE_CHOICE":
        return inputs, None
    first = next((x for x in inputs if x is not None), None)
    for x in inputs:
        if x is not None and (x.ndim < 3 or x.shape[:2] != first.shape[:2]):  # type: ignore[union-attr]
            raise ValueError(
                "MULTIPLE_CHOICE reads inputs of the shape [batch, choices, seq], with the same choices in all; got "
                f"{', '.join(str(list(x.shape)) for x in inputs if x is not None)}"
            )
    flat = tuple(None if x is None else x.reshape(-1, *x.shape[2:]) for x in inputs)
    return flat, None if first is None else first.shape[1]


def by_choice(logits: jax.Array, choices: int | None) -> jax.Array:
    """`[batch * choices, 1]` as `[batch, choices]`; other logits as they are."""
    return logits if choices is None else logits.reshape(-1, choices)


def check_packing(task: str, segment_ids: Any) -> None:
    """Raises a ValueError where rows of several examples would need several outputs each."""
    if segment_ids is not None and task in ONE_PER_ROW:
        raise ValueError(f"{task} gives one output per row, so a row cannot pack several examples (segment_ids)")
