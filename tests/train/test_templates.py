# SPDX-License-Identifier: Apache-2.0
"""Conversations become the text that transformers makes of them; what is learnt of it is the answers, to their end."""

import json

import chat_tokenizer as tiny
import jax
import numpy as np
import pytest

from jpeft import models
from jpeft.train import chat, cli, config, data, loop, masking, saved, templates, tokenizer
from jpeft.train.encoding import Encoder
from jpeft.train.examples import IGNORED
from jpeft.train.formats import Message

TALK = [("user", "How are  you?"), ("assistant", "Fine.\nAnd you"), ("user", "Fine."), ("assistant", "Fine.")]
TEMPLATES = {"chatml": tiny.CHATML, "instruct": tiny.INSTRUCT, "thinking": tiny.THINKING}


def messages(talk=TALK, **changes):
    return [Message(*turn, **changes) for turn in talk]


def learnt(folder, rows, *, form="messages", **options):
    """Of every row what is learnt, as text, piece by piece; and the examples."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    what = config.Data(train=str(file), max_length=options.pop("max_length", 512), **options)
    tokens = tokenizer.load(folder)
    examples = data.encode(data.read_rows(what, "CAUSAL_LM", "train"), what, tokens, None)
    found = []
    for ids, labels in zip(examples.tokens, examples.labels, strict=True):
        counts = np.diff(np.concatenate([[0], labels != IGNORED, [0]]).astype(int))
        starts, ends = np.flatnonzero(counts == 1), np.flatnonzero(counts == -1)
        assert (ids[labels != IGNORED] == labels[labels != IGNORED]).all()
        found.append([tokens.backend.decode(list(ids[a:b]), False) for a, b in zip(starts, ends, strict=True)])
    return found, examples


def rows_of(*talks):
    return [{"messages": [{"role": role, "content": content} for role, content in talk]} for talk in talks]


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_transformers_own(tmp_path, name, generation):
    from transformers import AutoTokenizer

    folder = tiny.write(tmp_path, TEMPLATES[name])
    talk = [{"role": role, "content": content} for role, content in TALK[: 3 if generation else 4]]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        talk, tokenize=False, add_generation_prompt=generation
    )
    assert templates.load(tokenizer.load(folder))(talk, generation=generation) == theirs


def test_the_marks_of_answers_are_shown_as_they_are(tmp_path):
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    folder = tiny.write(tmp_path, source)
    assert templates.load(tokenizer.load(folder))([{"role": "assistant", "content": "x"}]) == "x"


@pytest.mark.parametrize(
    "name, ends",
    [("chatml", ["Fine.\nAnd you<|im_end|>", "Fine.<|im_end|>"]), ("instruct", [" Fine.\nAnd you</s>", " Fine.</s>"])],
)
def test_answers_are_learnt_with_what_ends_them(tmp_path, name, ends):
    found, examples = learnt(tiny.write(tmp_path, TEMPLATES[name]), rows_of(TALK))
    assert found == [ends]  # and not what the user says in the same words
    assert examples.unended == (name == "chatml")  # <|im_end|> is not this tokenizer's end of text


def test_a_template_that_rewrites_what_came_before(tmp_path):
    found, _ = learnt(tiny.write(tmp_path, tiny.THINKING), rows_of(TALK))
    assert found == [["Fine.\nAnd you<|im_end|>", "<think>\n\n</think>\n\nFine.<|im_end|>"]]


def test_an_answer_that_cannot_be_found_is_refused(tmp_path):
    talk = [("user", "1"), ("assistant", "<think>hm</think>one"), ("user", "2"), ("assistant", "two")]
    folder = tiny.write(tmp_path, tiny.THINKING)
    with pytest.raises(
        data.DataError, match=r"rows\.jsonl:1: the template .* writes message 2 otherwise .*loss_on=last"
    ):
        learnt(folder, rows_of(talk))
    found, _ = learnt(folder, rows_of(talk), loss_on="last")
    assert found == [["<think>\n\n</think>\n\ntwo<|im_end|>"]]


@pytest.mark.parametrize(
    "loss_on, numbers", [("responses", [1, 3]), ("last", [3]), ("all", [0, 1, 2, 3]), (("user",), [0, 2])]
)
def test_which_messages_are_learnt(loss_on, numbers):
    assert masking.chosen(messages(), loss_on) == numbers


def test_a_message_has_its_own_word(tmp_path):
    said = messages()
    said[1], said[2] = Message("assistant", "no", False), Message("user", "yes", True)
    assert masking.chosen(said, "responses") == [2, 3]
    rows = rows_of(TALK)
    rows[0]["messages"][1]["train"] = False
    rows[0]["messages"][2]["weight"] = 1
    found, _ = learnt(tiny.write(tmp_path, tiny.CHATML), rows)
    assert found == [["Fine.<|im_end|>", "Fine.<|im_end|>"]]


def test_all_is_the_whole_text(tmp_path):
    found, _ = learnt(tiny.write(tmp_path, tiny.CHATML), rows_of(TALK[:2]), loss_on="all")
    assert found == [["<|im_start|>user\nHow are  you?<|im_end|>\n<|im_start|>assistant\nFine.\nAnd you<|im_end|>\n"]]


def test_a_start_token_stands_once(tmp_path):
    folder = tiny.write(tmp_path, "{{ bos_token }}" + tiny.INSTRUCT, starts=True)
    _, examples = learnt(folder, rows_of(TALK[:2]))
    start = tokenizer.load(folder).bos_id
    assert [int(token == start) for token in examples.tokens[0]] == [1, *[0] * (len(examples.tokens[0]) - 1)]
    text, whole = learnt(folder, [{"text": "<s>so it is"}])
    assert text == [["<s>so it is</s>"]]
    assert whole.tokens[0].tolist().count(start) == 1


def test_padding_with_the_end_of_text_does_not_hide_it(tmp_path):
    folder = tiny.write(tmp_path, tiny.INSTRUCT)
    _, examples = learnt(folder, rows_of(TALK[:2], TALK))
    words = tokenizer.load(folder)
    assert words.pad_id == words.eos_id
    made = data.make_batches(examples, batch_size=2, accumulation=1, max_length=512, num_widths=1, pad_id=words.pad_id)
    labels = made.collate(made.buckets.in_order()[0])["labels"][0]
    assert (labels == words.eos_id).sum(axis=1).tolist() == [1, 2]
    assert examples.unended == 0


@pytest.mark.parametrize(
    "form, row",
    [
        ("alpaca", {"instruction": "How are", "input": "you?", "output": "Fine."}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "How"}, {"from": "gpt", "value": "Fine."}]}),
        ("prompt_completion", {"prompt": "How are you?", "completion": "Fine."}),
        ("question_answer", {"question": "How are you?", "context": ["One.", "Two."], "answer": "Fine."}),
    ],
)
@pytest.mark.parametrize("name", ["alpaca", "plain", "chatml", "llama-3"])
def test_every_form_through_every_named_template(tmp_path, form, row, name):
    folder = tiny.write(tmp_path, starts=name == "plain")
    found, examples = learnt(folder, [row], template=name)
    end = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}.get(name, "</s>")
    assert found == [["Fine." + end]]
    text = tokenizer.load(folder).backend.decode(examples.tokens[0].tolist(), False)
    assert text.count("<s>") == (name == "plain")
    for value in ("How", "One.\nTwo.") if form == "question_answer" else ("How",):
        assert value in text


def test_a_cut_answer_is_counted_and_a_cut_prompt_is_dropped(tmp_path):
    folder = tiny.write(tmp_path)
    rows = [{"prompt": "p" * n, "completion": "answer"} for n in (2, 12, 16, 40)]
    found, examples = learnt(folder, rows, max_length=16)
    assert found == [["answer</s>"], ["answ"]]
    assert (examples.rows, examples.truncated, examples.dropped, examples.unended) == (4, 3, 2, 1)
    assert examples.lost == 3 + 7 + 31
    assert "1 learn no end of text" in str(examples)


@pytest.mark.parametrize(
    "options, special, said",
    [
        ({}, tiny.SPECIAL, "has no chat template.*data.template"),
        ({"template": "chatml"}, ["<s>", "</s>"], r"writes <\|im_start\|>, which is no token"),
        ({"template": "chatlm"}, tiny.SPECIAL, "neither a file nor one of chatml, llama-3, alpaca, plain"),
    ],
)
def test_a_template_that_is_not_there(tmp_path, options, special, said):
    with pytest.raises(ValueError, match=said):
        learnt(tiny.write(tmp_path, special=special), rows_of(TALK), **options)


def test_a_template_of_ones_own(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    found, _ = learnt(tiny.write(tmp_path), rows_of(TALK[:2]), template=str(file))
    assert found == [["assistant: Fine.\nAnd you</s>"]]  # nothing says what stands before an answer


def test_preference_pairs_share_their_prompt(tmp_path):
    folder = tiny.write(tmp_path, tiny.CHATML)
    asked, well, ill = (
        {"role": role, "content": content}
        for role, content in (("user", "How?"), ("assistant", "Well."), ("assistant", "Ill, I fear."))
    )
    rows = [
        {"prompt": "How?", "chosen": "Well.", "rejected": "Ill, I fear."},
        {"prompt": [asked], "chosen": [well], "rejected": [ill]},
        {"chosen": [asked, well], "rejected": [asked, ill]},
    ]
    for row in rows:
        file = folder / "pairs.jsonl"
        file.write_text(json.dumps(row) + "\n")
        what, words = config.Data(train=str(file)), tokenizer.load(folder)
        examples = data.encode(data.read_rows(what, "PREFERENCE", "train"), what, words, None)
        assert (len(examples), examples.per_example, len(examples.tokens)) == (1, 2, 2)
        texts = [words.backend.decode(labels[labels != IGNORED].tolist(), False) for labels in examples.labels]
        assert texts == ["Well.<|im_end|>", "Ill, I fear.<|im_end|>"]
        made = data.make_batches(examples, batch_size=2, accumulation=1, max_length=128, num_widths=1, pad_id=0)
        batch = made.buckets.in_order()[0]
        arrays = made.collate(batch)
        assert arrays["input_ids"].shape[:2] == (1, 4)
        assert [int((row != IGNORED).sum()) for row in arrays["labels"][0]] == [6, 13, 0, 0]
        assert made.sizes(batch) == (sum(map(len, examples.tokens)), arrays["input_ids"].size)


@pytest.mark.parametrize("name, starts", [("alpaca", True), ("plain", False)])
def test_an_adapter_is_asked_as_it_was_taught(llama, tmp_path, capsys, name, starts):
    """Its template stands beside it, though its base has none; transformers, a chat and `generate --chat` take it."""
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    sizes = {"vocab_size": 256 + len(tiny.SPECIAL), "max_position_embeddings": 128}
    models.save(models.build(json.loads((llama / "config.json").read_text()) | sizes, key=jax.random.key(0)), base)
    tiny.write(base, starts=starts)
    rows = tmp_path / "rows.jsonl"
    said = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "was good"}]
    rows.write_text((json.dumps({"messages": said}) + "\n") * 4)
    tree = {
        "model": {"path": str(base), "task": "CAUSAL_LM"},
        "data": {"train": str(rows), "template": name, "max_length": 96},
        "method": {"kind": "lora", "rank": 2, "alpha": 4, "targets": ["q_proj"]},
        "train": {"max_steps": 1, "batch_size": 2},
        "out": str(tmp_path / "run"),
    }
    adapter = loop.train(config.parse(tree)).adapter
    talk = chat.Conversation(base, {"it": adapter})
    theirs = AutoTokenizer.from_pretrained(adapter)
    ids = talk.prompt(said[:1])
    assert ids == theirs.apply_chat_template(said[:1], add_generation_prompt=True, return_dict=False)
    assert (ids[:1] == [tokenizer.load(base).bos_id]) == starts
    assert talk.prompt(said) == theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    with pytest.raises(ValueError, match="has no chat template"):
        talk.switch("base")
    assert talk.speaker == "it"
    opened = saved.open_model(None, adapter)
    assert templates.asked(["a film"], opened.tokenizer, opened.template) == [ids]
    capsys.readouterr()
    cli.main(["generate", "--adapter", str(adapter), "--chat", "--max-new-tokens", "4", "a film"])
    assert capsys.readouterr().out == "".join(talk.answer("a film", max_new_tokens=4)) + "\n"
    saved.save_merged(opened, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == theirs.chat_template


def test_of_forms_with_several_templates_that_of_messages_is_kept(tmp_path):
    folder = tiny.write(tmp_path / "model", tiny.CHATML)
    files = {"pairs": {"prompt": "a", "completion": "b"}, "talks": rows_of(TALK)[0], "texts": {"text": "a"}}
    for file, row in files.items():
        (tmp_path / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
    words = tokenizer.load(folder)

    def spoken(*names):
        what = config.Data(train=tuple(str(tmp_path / f"{name}.jsonl") for name in names))
        readers = [part.reader for part in data.read_rows(what, "CAUSAL_LM", "train")]
        found = Encoder(what, words, None).spoken(readers)
        return found and found.name

    assert spoken("texts", "pairs", "talks") == "of the tokenizer"
    assert spoken("texts", "pairs") == "plain"
    assert spoken("texts") is None
