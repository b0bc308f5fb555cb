# SPDX-License-Identifier: Apache-2.0
"""`jpeft eval --task`: classes and losses against transformers, what is written, how it is scored, what is recorded."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import jpeft
from jpeft.train import cli, tasks
from jpeft.train.tasks import formulas, gsm8k, humaneval, overlap

#: Float32 losses of a hundred tokens, added up in another order.
ROUNDING = 1e-5
NAMES = ["maybe", "yes", "no"]


def run(capsys, *arguments):
    """(exit code, output) of `jpeft eval`."""
    code = 0
    try:
        cli.main(["eval", *map(str, arguments)])
    except SystemExit as end:
        code = end.code or 0
    out, err = capsys.readouterr()
    return code, out + err


@pytest.fixture(scope="module")
def classifier(bert, tmp_path_factory):
    """Folder of a tiny BERT with three classes, of which each is predicted for some."""
    folder = tmp_path_factory.mktemp("models") / "classifier"
    config = json.loads((bert / "config.json").read_text()) | {
        "architectures": ["BertForSequenceClassification"],
        "id2label": dict(enumerate(NAMES)),
        "label2id": {name: i for i, name in enumerate(NAMES)},
        "initializer_range": 0.7,
    }
    jpeft.models.save(jpeft.models.build(config, "SEQ_CLS", key=jax.random.key(3)), folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": config["id2label"]}))
    backend = Tokenizer.from_file(str(bert / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.save(str(folder / "tokenizer.json"))
    shutil.copy(bert / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = "good great fine bad poor dull film plot cast scene the a is was and".split()
    rows = [
        {
            "question": " ".join(rng.choice(words, rng.integers(1, 6))),
            "contexts": [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(2)],
            "final_decision": str(rng.choice(["yes", "no", "maybe"])),
        }
        for _ in range(41)
    ]
    file = tmp_path_factory.mktemp("questions") / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, rows


def test_classes_are_transformers(capsys, classifier, questions, tmp_path):
    file, rows = questions
    out = tmp_path / "record.json"
    code, said = run(
        capsys, "--task", "pubmedqa", "--model", classifier, "--data", file, "--out", out, "--batch-size", 8
    )
    assert code == 0, said
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    words = transformers.AutoTokenizer.from_pretrained(classifier)
    record, expected = json.loads(out.read_text()), []
    for row in rows:
        ids = words(row["question"], "\n".join(row["contexts"]), return_tensors="pt")
        ids["token_type_ids"] = second_text(ids["input_ids"])
        with torch.no_grad():
            expected.append(NAMES[int(theirs(**ids).logits.argmax())])
    truth = [row["final_decision"] for row in rows]
    assert len(set(expected)) > 1
    assert record["predicted"] == expected
    assert record["metrics"]["accuracy"]["value"] == pytest.approx(accuracy_score(truth, expected))
    assert record["metrics"]["macro_f1"]["value"] == pytest.approx(f1_score(truth, expected, average="macro"))
    assert record["majority"]["accuracy"] == max(truth.count(name) for name in NAMES) / len(truth)
    assert record["collapsed"] is None
    assert record["data"]["rows"] == 41
    assert len(record["data"]["sha256"]) == 64
    assert record["published"]["human, macro-F1"] == "72.2 (Jin et al., 2019)"


def second_text(ids):
    """0 up to the first [SEP], then 1."""
    ends = (ids == 3).int()
    return ((ends.cumsum(1) - ends) > 0).long()


def test_a_collapse_is_flagged(capsys, classifier, questions, tmp_path):
    _, rows = questions
    same = tmp_path / "same.jsonl"
    same.write_text("".join(json.dumps({**rows[0], "final_decision": row["final_decision"]}) + "\n" for row in rows))
    code, said = run(capsys, "--task", "pubmedqa", "--model", classifier, "--data", same, "--out", tmp_path / "r.json")
    assert code == 0, said
    assert "collapsed: every row is said to be" in said


def test_perplexity_is_transformers(capsys, llama, reviews, tmp_path):
    out = tmp_path / "record.json"
    code, said = run(
        capsys, "--task", "perplexity", "--model", llama, "--data", reviews / "eval.jsonl", "--limit", 9, "--out", out,
        "--max-length", 6,
    )  # fmt: skip
    assert code == 0, said
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    words = transformers.AutoTokenizer.from_pretrained(llama)
    texts = [json.loads(line)["text"] for line in (reviews / "eval.jsonl").read_text().splitlines()][:9]
    loss, count = 0.0, 0
    for text in texts:
        ids = [*words(text)["input_ids"], words.eos_token_id]
        for at in range(0, len(ids), 6):
            row = torch.tensor([ids[at : at + 6]])
            if row.shape[1] > 1:
                with torch.no_grad():
                    loss += float(theirs(row, labels=row).loss) * (row.shape[1] - 1)
                count += row.shape[1] - 1
    found = json.loads(out.read_text())
    assert found["predicted_tokens"] == count
    assert found["metrics"]["loss"]["value"] == pytest.approx(loss / count, abs=ROUNDING)
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(loss / count), rel=ROUNDING)
    bits = loss / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=ROUNDING)


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Files of problems in the words that the tiny model knows."""
    folder = tmp_path_factory.mktemp("sums")
    rows = [{"question": "good film " * n, "answer": f"so\n#### {n}"} for n in range(1, 8)]
    for name, some in (("test", rows[2:]), ("train", rows[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def test_what_is_written_is_recorded_and_drawn_alike_in_any_batch(capsys, llama, sums, tmp_path):
    found = []
    for size in (1, 4):
        out = tmp_path / f"{size}.json"
        code, said = run(
            capsys, "--task", "gsm8k", "--model", llama, "--data", sums / "test.jsonl", "--out", out, "--shots", 2,
            "--shots-from", sums / "train.jsonl", "--samples", 3, "--temperature", 1.0, "--seed", 7, "--top-p", 0.9,
            "--max-new-tokens", 5, "--batch-size", size, "--limit", 4,
        )  # fmt: skip
        assert code == 0, said
        found.append(json.loads(out.read_text()))
    texts = [[row["texts"] for row in record["examples"]] for record in found]
    assert texts[0] == texts[1]
    assert len({text for row in texts[0] for text in row}) > 4
    record = found[0]
    question = "good film " * 3
    assert record["examples"][0]["prompt"] == (
        f"Question: good film \nAnswer: so\n#### 1\n\nQuestion: {'good film ' * 2}\nAnswer: so\n#### 2\n\n"
        f"Question: {question}\nAnswer:"
    )
    assert (
        record["generation"] | {"max_new_tokens": 5, "temperature": 1.0, "samples": 3, "seed": 7, "top_p": 0.9}
        == (record["generation"])
    )
    assert len(record["examples"]) == record["data"]["rows"] == 4
    assert record["versions"]["jpeft"] == jpeft.__version__


def test_gsm8k_is_scored_by_hand():
    rows = [{"answer": "so #### 1,200"}, {"answer": "so #### 3"}]
    found = gsm8k.score(rows, [["#### 1200", "it is $1,200.00"], ["3 and then 4", "nothing"]], 0)
    values = {name: estimate.value for name, estimate in found.metrics.items()}
    assert values == {
        "strict_match": (0.5 + 0) / 2,
        "flexible_extract": (0.5 + 0) / 2,
        "equal_value": (1.0 + 0) / 2,
        "strict_failed": (0.5 + 1) / 2,
        "flexible_failed": (0 + 0.5) / 2,
    }


def test_formulas_are_scored_by_hand():
    rows = [{"answer": r"\frac{1}{2}", "level": 1}, {"answer": "x+1", "level": 2}]
    written = [[r"\boxed{0.5}", "The answer is 1/2."], [r"\boxed{1+x}", "so 7"]]
    found = formulas.score(rows, written, 0)
    values = {name: estimate.value for name, estimate in found.metrics.items()}
    assert values == {
        "strict_match": 0.5,
        "flexible_extract": 0.75,
        "strict_failed": 0.5,
        "flexible_failed": 0.0,
    }
    assert found.notes == {"strict_match by group": {"level 1": 0.5, "level 2": 0.5}}
    assert found.examples[1]["found"][0]["decided_by"] == ["math-verify", "math-verify"]


@pytest.mark.usefixtures("confined")
def test_programs_are_scored_in_the_sandbox(data):
    rows = [json.loads(line) for line in (data / "humaneval" / "test.jsonl").read_text().splitlines()][:6]
    written = [[row["canonical_solution"], "    return None\n"] for row in rows]
    found = humaneval.score(rows, written, 0)
    assert found.metrics["pass@1"].value == 0.5
    assert list(found.metrics) == ["pass@1", "token_jaccard"]
    assert [row["jaccard"][0] for row in found.examples] == [1.0] * 6
    assert found.notes["sandbox"]["system calls"] == "active"
    fenced = [f"Here:\n```python\n{row['prompt']}{row['canonical_solution']}```\nDone." for row in rows]
    assert humaneval.score(rows, [[text] for text in fenced], 0).metrics["pass@1"].value == 1.0


def test_overlaps_carry_signatures():
    found = overlap.scorer("rouge_l", "bleu", "chrf")([{"output": "a cat sat"}] * 2, [["a cat sat"], [""]], 0)
    assert found.metrics["rouge_l"].value == pytest.approx(50.0)
    assert sorted(found.notes["signatures"]) == ["bleu", "chrf"]
    assert found.notes["empty"] == 1


SUMMING = ["--task", "gsm8k", "--model", "LLAMA", "--data", "SUMS"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--task", "sst2", "--model", "LLAMA", "--data", "SUMS"], "needs a model for SEQ_CLS; this one is for CAUSAL"),
        (["--task", "gsm8k", "--model", "LLAMA", "--data", "SUMS", "--samples", "2"], "give --temperature"),
        (["--task", "gsm8k", "--model", "LLAMA", "--data", "SUMS", "--limit", "0"], "--limit is 1 or more, got 0"),
        (["--task", "math500", "--model", "LLAMA", "--data", "SUMS"], "needs a column 'problem'; there are question"),
        (["--task", "translation", "--model", "LLAMA"], "has no data of its own; name a file by --data"),
        (["--task", "aime24", "--model", "LLAMA", "--data", "AIME", "--shots", "1"], "no answer to show"),
        (["--task", "gsm8k", "--model", "LLAMA", "--data", "SUMS", "--shots", "9", "--shots-from", "SUMS"], "not 9"),
        (["--task", "gsm8k", "--model", "LLAMA", "--data", "SUMS", "SUMS"], "a task reads one file"),
        (["--task", "sst2", "--model", "BERT", "--data", "SENTENCES"], "the model's are maybe, yes, no"),
        (["--model", "LLAMA"], "takes a file"),
        ([*SUMMING, "--max-new-tokens", "0"], "--max-new-tokens is 1 or more, got 0"),
        ([*SUMMING, "--shots", "-1"], "--shots is 0 or more, got -1"),
        ([*SUMMING, "--samples", "0"], "--samples is 1 or more, got 0"),
        ([*SUMMING, "--temperature", "-1"], "--temperature is 0 or a number above it, got -1.0"),
        ([*SUMMING, "--temperature", "nan"], "--temperature is 0 or a number above it, got nan"),
        ([*SUMMING, "--temperature", "1", "--top-p", "1.5"], "--top-p is a share of what may be drawn, in (0, 1]"),
        ([*SUMMING, "--top-p", "0.9"], "--top-p 0.9 is of what is drawn; temperature 0 draws nothing"),
        ([*SUMMING, "--shots-from", "SUMS"], "is where shots are from, and shots is 0"),
        ([*SUMMING, "--max-length", "64"], "gsm8k writes, and reads whole prompts, so it has no use for --max-length"),
        ([*SUMMING, "--max-length", "0"], "--max-length is 1 or more, got 0"),
        ([*SUMMING, "--text", "question"], "--text is not of a task: its columns are its own"),
        (
            ["--task", "sst2", "--model", "BERT", "--data", "SENTENCES", "--shots", "5", "--chat"],
            "the task sst2 writes nothing, so it has no use for --shots, --chat",
        ),
        (
            ["--task", "perplexity", "--model", "LLAMA", "--data", "SUMS", "--max-new-tokens", "5"],
            "the task perplexity writes nothing, so it has no use for --max-new-tokens",
        ),
        (["--model", "LLAMA", "--data", "SUMS", "--limit", "5", "--out", "x"], "--limit, --out are of a task (--task)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(capsys, llama, classifier, sums, tmp_path, arguments, said):
    (tmp_path / "aime.jsonl").write_text('{"problem": "good", "expected_answer": "7"}\n')
    (tmp_path / "sentences.jsonl").write_text('{"sentence": "good", "label": 1}\n')
    places = {"LLAMA": llama, "BERT": classifier, "SUMS": sums / "test.jsonl", "AIME": tmp_path / "aime.jsonl"}
    places["SENTENCES"] = tmp_path / "sentences.jsonl"
    code, found = run(capsys, *(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert said in found


def test_data_of_the_hub_that_is_not_here_can_be_a_file(capsys, llama, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    code, found = run(capsys, "--task", "gsm8k", "--model", llama)
    assert code != 0
    assert "openai/gsm8k, split 'test', cannot be loaded: the hub cannot be reached. The task's own data" in found
    assert "--data names a file with such rows" in found


def test_every_task_can_be_found():
    for name in tasks.TASKS:
        assert tasks.find(name).published is not None
    with pytest.raises(ValueError, match="no task is called 'x'; there are sst2"):
        tasks.find("x")
