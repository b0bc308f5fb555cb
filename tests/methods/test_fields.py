# SPDX-License-Identifier: Apache-2.0
"""Every option of every method, given what it is not: it is taken, or refused by an error that names it."""

import dataclasses
import math
import re

import numpy as np
import pytest

import jpeft

#: What a stranger might pass, and what a file with a mistake in it.
ODD = [
    "abc", "", b"x", -1, 0, 1.5, -0.5, math.nan, math.inf, True, None, 10**12, object(), [1], ["a", "a"], [None], (),
    {"q"}, {"a": 1}, {"(": 1}, {0: 0}, {"default": -1}, range(2), np.int64(3), np.float32(0.1),
    np.array([1, 2]), np.array(3),
]  # fmt: skip
NEEDED = {
    "adalora": {"total_steps": 3000},
    "trainable_tokens": {"token_indices": (1,)},
    "adapter_fusion": {"adapters": ("a", "b")},
    "last_layers": {"n": 1},
}
#: Words by which an error may name an option instead.
ALSO = {
    "rank_pattern": ("rank",),
    "alpha_pattern": ("alpha",),
    "token_indices": ("token index", "ids of tokens", "one row for each token"),
    "trainable_token_indices": ("token index", "ids of tokens", "one row for each token"),
}
FIELDS = [(kind, field.name) for kind, method in jpeft.METHODS.items() for field in dataclasses.fields(method)]


@pytest.mark.untyped
@pytest.mark.parametrize("kind, field", FIELDS)
def test_an_option_is_taken_or_refused_by_name(kind, field):
    named, refused = "|".join([field, *ALSO.get(field, ())]), 0
    for value in ODD:
        try:
            method = jpeft.METHODS[kind](**{**NEEDED.get(kind, {}), field: value})
        except (TypeError, ValueError) as error:
            message, refused = str(error), refused + 1
            assert re.search(named, message), (value, message)
        else:
            assert hash(method) == hash(dataclasses.replace(method)), value
            assert method == dataclasses.replace(method), value
    assert refused >= 5


@pytest.mark.parametrize(
    "kind, field",
    [
        ("lora", "rank"), ("dora", "rank"), ("adalora", "init_rank"), ("loha", "rank"), ("lokr", "rank"),
        ("vera", "rank"), ("loreft", "rank"), ("compacter", "rank"), ("prompt_tuning", "num_tokens"),
        ("p_tuning", "num_tokens"), ("p_tuning", "hidden_size"), ("prefix_tuning", "num_tokens"),
    ],
)  # fmt: skip
def test_an_array_that_no_layer_is_as_wide_as_is_refused(kind, field):
    with pytest.raises(ValueError, match=rf"{field} must be at most 1,048,576, got 99999999"):
        jpeft.METHODS[kind](**{**NEEDED.get(kind, {}), field: 99999999})


FLAGS = [
    (kind, field.name)
    for kind, method in jpeft.METHODS.items()
    for field in dataclasses.fields(method)
    if isinstance(field.default, bool)
]


@pytest.mark.untyped
@pytest.mark.parametrize("kind, field", FLAGS)
def test_a_word_is_no_flag(kind, field):
    """`"false"` would count as true."""
    assert len(FLAGS) > 40
    with pytest.raises(ValueError, match=rf"{field} must be one of (None, )?True, False.*; got 'false'"):
        jpeft.METHODS[kind](**{**NEEDED.get(kind, {}), field: "false"})


HINTS = [
    (jpeft.LoRA, {"rank": np.int64(3)}, r"LoRA's rank must be .*, got np.int64\(3\); pass int\(\.\.\.\) of it"),
    (jpeft.LoRA, {"alpha": np.float32(3)}, r"alpha must be .*; pass float\(\.\.\.\) of it"),
    (jpeft.LoRA, {"dropout": np.float32(0.1)}, r"dropout must be .*; pass float\(\.\.\.\) of it"),
    (jpeft.LoRA, {"rank_pattern": {"(": 3}}, r"rank_pattern has the key '\(', which is no regular expression: missing"),
    (
        jpeft.LoRA,
        {"alpha_pattern": [3]},
        r"LoRA's alpha_pattern takes a mapping of modules' names to numbers, got \[3\]",
    ),
    (jpeft.Pfeiffer, {"leave_out": -1}, "leave_out takes the indices of layers, counted from 0, got -1"),
    (jpeft.Pfeiffer, {"blocks": 3}, "Pfeiffer's blocks takes names, as strings, got 3"),
    (jpeft.PromptTuning, {"init": "text", "token_ids": 3}, "token_ids are a list of ids, as a tokenizer gives, got 3"),
    (jpeft.AdaLoRA, {"total_steps": 9, "tinit": 0, "tfinal": 0, "beta1": "a"}, "beta1 must be a number, got 'a'"),
]


@pytest.mark.untyped
@pytest.mark.parametrize("make, options, message", HINTS, ids=lambda value: str(value)[:40])
def test_it_says_what_to_write(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_first_layer_can_be_left_out_by_its_number():
    assert jpeft.Pfeiffer(leave_out=0).leave_out == jpeft.Pfeiffer(leave_out=[0]).leave_out == (0,)
    assert jpeft.Pfeiffer(leave_out=()).leave_out == jpeft.Pfeiffer(leave_out=None).leave_out == ()


def test_layers_may_come_as_numpys():
    assert jpeft.LoRA(layers=np.arange(3)) == jpeft.LoRA(layers=range(3))
