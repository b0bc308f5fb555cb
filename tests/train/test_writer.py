# SPDX-License-Identifier: Apache-2.0
"""Text that is written: pieces that join to the whole, stop strings across tokens, chats; and the two commands."""

import io
import json
import shutil
import sys

import jax
import numpy as np
import pytest
import subjects
import transformers

import jpeft
from jpeft import models
from jpeft.train import chat, cli, tokenizer
from jpeft.train.writer import Writer, certain

PROMPTS = ["Once upon a time", "Lily and Ben"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(name="folder", scope="module")
def _folder(data, tmp_path_factory):
    """stories260K with a chat template."""
    folder = tmp_path_factory.mktemp("stories") / "model"
    shutil.copytree(data / "models" / "stories260K", folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(name="writer", scope="module")
def _writer(folder):
    words = tokenizer.load(folder)
    return Writer(models.load(folder), words, tokenizer.ends(folder, words))


@pytest.fixture(name="adapters", scope="module")
def _adapters(folder, tmp_path_factory):
    """Two LoRA folders by name."""
    base, found = models.load(folder), {}
    for seed, (name, rank) in enumerate({"tall": 2, "wide": 4}.items()):
        lora = jpeft.LoRA(rank=rank, alpha=8.0, targets=["q_proj", "v_proj"])
        model = subjects.fill(jpeft.adapt(base, lora, key=jax.random.key(seed)), seed)
        found[name] = tmp_path_factory.mktemp(name)
        jpeft.export_peft(model, found[name], base=str(folder))
    return found


def test_text_is_transformers(writer, folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt, (found,) in zip(PROMPTS, writer.write(PROMPTS, max_new_tokens=24), strict=True):
        ids = words(prompt, return_tensors="pt")
        out = theirs.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        whole, start = (words.decode(x, skip_special_tokens=True) for x in (out[0], ids["input_ids"][0]))
        assert found == whole[len(start) :]


@pytest.mark.parametrize("stop", [["was a little"], ["e up", " girl named Lil"], ["zzz"]])
def test_a_stop_string_ends_a_text_wherever_tokens_end(writer, stop):
    (whole,) = writer.write(PROMPTS[:1], max_new_tokens=24)[0]
    places = [whole.find(string) for string in stop if string in whole]
    expected = whole[: min(places)] if places else whole
    assert (expected != whole) == (stop != ["zzz"])
    ids = writer.tokenizer.encode(PROMPTS[:1])
    for chunk in (1, 3, 8):
        pieces = [piece for ((piece,),) in writer.stream(ids, stop=stop, chunk=chunk, max_new_tokens=24)]
        assert "".join(pieces) == expected
        for end in range(len(pieces)):  # nothing is taken back
            assert expected.startswith("".join(pieces[:end]))


def test_streamed_samples_are_those_written_at_once(writer):
    told = {"max_new_tokens": 12, "temperature": 1.2, "num_return_sequences": 3, "key": jax.random.key(5)}
    written = writer.write(PROMPTS, **told)
    ids, mask = writer._padded(writer.tokenizer.encode(PROMPTS))
    found = np.asarray(models.generate(writer.model, ids, mask, eos_token_id=writer.ends, **told))
    for row, prompt in enumerate(writer.tokenizer.encode(PROMPTS)):
        for text in range(3):
            stops = np.isin(found[row, text], writer.ends)
            kept = found[row, text][np.cumsum(stops) == 0].tolist()
            start = len(writer.tokenizer.decode(prompt))
            assert written[row][text] == writer.tokenizer.decode(prompt + kept)[start:]


def test_searched_texts_may_be_stopped_too(writer):
    told = {"max_new_tokens": 16, "num_beams": 3, "num_return_sequences": 2}
    ((first, second),) = writer.write(PROMPTS[:1], **told)
    assert first != second
    assert writer.write(PROMPTS[:1], stop=[first[5:9]], **told)[0][0] == first[: first.index(first[5:9])]


def test_half_characters_and_beginnings_of_stop_strings_wait():
    assert certain("caf\ufffd", ()) == 3
    assert certain("caf\ufffd\ufffd", ("f",)) == 2
    assert certain("the EN", ("END", "\n")) == 4
    assert certain("the END", ("ENDING",)) == 4
    assert certain("the end", ("END",)) == 7


def test_bytes_of_a_character_come_together(folder):
    """A character of four byte tokens, one token at a time."""
    words = tokenizer.load(folder)
    ids = words.encode_plain("a 🦜 b")
    from jpeft.train.writer import _Text

    text = _Text(words, (), (), words.encode_plain("so"))
    pieces = [text.given(np.array([token])) for token in ids]
    assert "🦜" in pieces
    assert "\ufffd" not in "".join(pieces) + text.last()
    assert "".join(pieces).strip() == "a 🦜 b"


def test_a_chat_has_one_bos_and_a_memory(folder, adapters):
    talk = chat.Conversation(folder, adapters, system="Be brief.")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    first = "".join(talk.answer("Hi", max_new_tokens=6))
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert talk.messages == [*asked, {"role": "assistant", "content": first}]
    ids = talk.prompt(talk.messages)
    expected = theirs.apply_chat_template(talk.messages, add_generation_prompt=True, return_dict=False)
    assert ids == expected
    assert ids.count(theirs.bos_token_id) == 1
    talk.reset()
    assert talk.messages == asked[:1]


def test_switching_adapters_compiles_nothing_and_answers_as_each_alone(folder, adapters):
    talk = chat.Conversation(folder, adapters)
    written = sys.modules[models.stream.__module__]
    programs = written._begin, written._advance
    sizes, base = [], models.load(folder, "CAUSAL_LM")
    for name in ("base", "tall", "wide"):
        talk.reset()
        talk.switch(name)
        found = "".join(talk.answer("Once upon", max_new_tokens=8))
        sizes.append([program._cache_size() for program in programs])
        alone = base if name == "base" else jpeft.import_peft(base, adapters[name])
        ids = np.array([talk.prompt(talk.messages[:1])])
        whole = models.generate(alone, ids, max_new_tokens=8, eos_token_id=talk._ends)[0].tolist()
        start = len(talk._words.decode(ids[0].tolist()))
        assert found == talk._words.decode([*ids[0].tolist(), *whole])[start:]
    assert sizes[0] == sizes[1] == sizes[2]


def run(capsys, monkeypatch, *arguments, typed=""):
    """(exit code, standard output, standard error) of a command."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


def test_generate_prints_what_follows(capsys, monkeypatch, folder, writer):
    told = ("generate", "--model", folder, "--max-new-tokens", "12")
    texts = [text for (text,) in writer.write(PROMPTS, max_new_tokens=12)]
    assert run(capsys, monkeypatch, *told, PROMPTS[0]) == (0, texts[0] + "\n", "")
    both = "".join(f"==> {prompt} <==\n{text}\n" for prompt, text in zip(PROMPTS, texts, strict=True))
    assert run(capsys, monkeypatch, *told, typed="\n".join(PROMPTS)) == (0, both, "")
    code, out, _ = run(capsys, monkeypatch, *told, "--num-beams", "2", "--early-stopping", "true", PROMPTS[0])
    assert (code, out.count("==>")) == (0, 1)


def test_chat_obeys(capsys, monkeypatch, folder, adapters):
    typed = "hello\n/switch tall\nhello\n/switch nobody\n/reset\n/dance\n/quit\nnever read\n"
    given = [f"--adapter={name}={path}" for name, path in adapters.items()]
    code, out, err = run(capsys, monkeypatch, "chat", "--model", folder, *given, "--max-new-tokens", "4", typed=typed)
    assert (code, len(out.splitlines()) >= 2) == (0, True)
    assert err.splitlines() == [
        "jpeft: error: no adapter is called 'nobody'; there are base, tall, wide",
        "jpeft: error: /dance is no command; there are /switch NAME, /reset, /quit",
    ]


def test_what_is_wrong_is_said_in_one_line(capsys, monkeypatch, data, folder, adapters):
    plain = data / "models" / "stories260K"
    for arguments, message in (
        (("generate", "--model", folder, "--top-k", "3", "x"), "top_k=3 is a rule of sampling"),
        (("generate", "--model", folder), "give a prompt"),
        (("generate", "--model", "nowhere", "x"), "nowhere"),
        (("generate", "--model", folder, "--stop", "", "x"), "stop is a list of strings"),
        (("chat", "--model", plain), "has no chat template"),
        (("chat", "--model", "nowhere"), "nowhere is no folder"),
        (("chat", "--model", folder, "--adapter", "x"), "--adapter is NAME=DIR"),
        (("chat", "--model", folder, "--adapter", f"base={adapters['tall']}"), "base is the name of the model"),
        (("chat", "--model", folder, "--adapter", "a=b", "--adapter", "a=c"), "has a name of its own"),
    ):
        code, out, err = run(capsys, monkeypatch, *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert message in err
