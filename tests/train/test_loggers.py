# SPDX-License-Identifier: Apache-2.0
"""The packages of the loggers themselves hold what a run told them, where they are installed."""

import importlib
import json
import struct

import pytest

from jpeft.train import config, loggers
from jpeft.train.sections import Logging

SETTINGS = {"optimizer": {"lr": 0.01}, "out": "runs/films"}
LINES = [
    {"update": 10, "epoch": 0.5, "loss": 0.75, "losses": [0.75], "lr": 0.01, "mfu": None},
    {"update": 10, "epoch": 0.5, "eval_loss": 0.5, "eval_accuracy": 0.875},
    {"update": 20, "epoch": 1.0, "loss": 0.25, "losses": [0.25], "lr": 0.005, "mfu": 0.125},
]
#: (figure, update) -> value, exact in float32.
TOLD = {
    ("train/loss", 10): 0.75, ("train/loss", 20): 0.25, ("eval/loss", 10): 0.5, ("eval/accuracy", 10): 0.875,
    ("train/mfu", 20): 0.125, ("train/epoch", 20): 1.0,
}  # fmt: skip


def tell(which, folder, **options):
    """What a run tells one logger."""
    folder.mkdir(exist_ok=True)
    (logger,) = loggers.opened(Logging(to=(which,), **options), folder, SETTINGS)
    for line in LINES:
        logger.log(line["update"], loggers.figures(line))
    logger.close()
    return logger


def test_the_names_of_figures():
    assert loggers.figures(LINES[0]) == {"train/epoch": 0.5, "train/loss": 0.75, "train/lr": 0.01}
    assert loggers.flat({"a": {"b": {"c": 1}}, "d": (2, 3)}) == {"a.b.c": 1, "d": (2, 3)}


def test_tensorboard_reads_them_in_the_event_file(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is absent")
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    tell("tensorboard", tmp_path / "run")
    (file,) = (tmp_path / "run/tensorboard").iterdir()
    content, at, found = file.read_bytes(), 0, {}
    while at < len(content):  # a record: its length, a checksum, the event, a checksum
        (size,) = struct.unpack_from("<Q", content, at)
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += size + 16
    assert TOLD.items() <= found.items()


def test_wandb_keeps_them_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is absent")
    wandb_internal_pb2 = importlib.import_module("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = tell("wandb", tmp_path / "run", project="films", name="first")
    run = logger._run
    assert (run.project, run.name) == ("films", "first")
    assert run.config["optimizer"] == {"lr": 0.01}
    wandb.teardown()  # its own process has written the file
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    content, at, found = file.read_bytes(), 7, {}
    while at < len(content):  # a record of LevelDB's log: checksum, length and kind, then its content
        _, size, kind = struct.unpack_from("<IHB", content, at)
        assert kind == 1, "a record in parts"
        record = wandb_internal_pb2.Record.FromString(content[at + 7 : at + 7 + size])
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found |= {(name, items["_step"]): value for name, value in items.items()}
        at += 7 + size
    assert TOLD.items() <= found.items()


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is absent")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = [tell("wandb", tmp_path / "run", project="films")._run.id for _ in range(2)]
    other = tell("wandb", tmp_path / "other", project="films")._run.id
    assert ids == [loggers.kept(tmp_path / "run")["wandb"]] * 2
    assert other != ids[0]


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is absent")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    first = tell("mlflow", tmp_path / "run", project="films")
    (again,) = loggers.opened(Logging(to=("mlflow",), project="films"), tmp_path / "run", SETTINGS)
    client = mlflow.MlflowClient()
    assert (again._run, client.get_run(again._run).info.status) == (first._run, "RUNNING")
    again.log(30, {"train/loss": 0.125})
    again.close()
    run = client.get_run(first._run)
    assert (run.data.metrics["train/loss"], run.info.status) == (0.125, "FINISHED")
    assert len(client.search_runs([run.info.experiment_id])) == 1
    (tmp_path / "run" / "loggers.json").write_text(json.dumps({"mlflow": "0" * 32}))
    with pytest.raises(config.ConfigError, match=r"none of this MLflow's .*delete loggers.json"):
        loggers.opened(Logging(to=("mlflow",), project="films"), tmp_path / "run", SETTINGS)


def test_mlflow_keeps_them_in_its_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is absent")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = tell("mlflow", tmp_path / "run", project="films", name="first")
    client = mlflow.MlflowClient()
    run = client.get_run(logger._run)
    assert client.get_experiment(run.info.experiment_id).name == "films"
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {"optimizer.lr": "0.01", "out": "runs/films"}
    for (name, update), value in TOLD.items():
        assert value in [
            metric.value for metric in client.get_metric_history(logger._run, name) if metric.step == update
        ]
