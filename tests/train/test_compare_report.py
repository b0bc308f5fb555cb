# SPDX-License-Identifier: Apache-2.0
"""What a report shows of figures that are known: collapses, groups, classes, and every plot."""

import csv
import dataclasses
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from jpeft.train.compare import figures, latency, report
from jpeft.train.compare.digest import Digest, dumped, read
from jpeft.train.compare.statistics import Difference, Interval
from jpeft.train.compare.table import COSTS, Row, Table
from jpeft.train.compare.table import _to_target as to_target

MEASURED = {
    "trained": 1000.0, "changed": 2000.0, "peak MB": 90.0, "step ms": 5.0, "forward ms": 2.0, "adapter KB": 4.0,
    "calibration error": 0.1, "general loss before": 1.5, "general loss after": 1.75,
}  # fmt: skip


def row(method, accuracy, *, collapsed=0, **changes):
    scores = {"accuracy": Interval(accuracy, accuracy - 0.05, accuracy + 0.05)}
    values = {
        "apart": Difference(Interval(0.1, 0.0, 0.2), 0.04),
        "costs": dict.fromkeys(COSTS) | MEASURED,
        "curve": [(10, [0.5, 0.6]), (20, [0.6, 0.7])],
        "chosen": {"optimizer.lr": 5e-4},
        "classes": {"no": (0.25, 0.5), "yes": (0.75, 0.875)},
        "groups": {"far": Interval(0.5, 0.4, 0.6), "near": Interval(0.75, 0.7, 0.8)},
        "memory": {"base and batch": 50.0, "on the way": 20.0},
    }
    return Row(method, 2, 0, collapsed, scores, **(values | changes))


@pytest.fixture(name="table")
def _table():
    majority = row("majority", 0.5, costs=dict.fromkeys(COSTS), curve=[], chosen={}, groups={}, memory={})
    rows = [majority, row("stuck", 0.5, collapsed=2), row("half", 0.6, collapsed=1), row("good", 0.75)]
    return Table("tiny", "reviews", None, "accuracy", True, 100, rows, {"no": 0.5, "yes": 0.5})


def test_what_only_collapsed_has_no_score(table):
    head, rows = report.scores(table, "good")
    assert head[:3] == ["method", "lr", "accuracy [95 %]"]
    assert [cells[0] for cells in rows] == ["majority", "good", "half", "stuck"]
    by_method = {cells[0]: cells[1:] for cells in rows}
    assert by_method["stuck"] == ["0.0005", "collapsed", "-", "-", "2, 2 collapsed"]
    assert by_method["half"][1] == "0.6000 [0.5500, 0.6500]"
    assert by_method["half"][-1] == "2, 1 collapsed"
    assert by_method["majority"][0] == "-"
    (line,) = report.flags(table)
    assert "stuck (2 of 2 seeds), half (1 of 2 seeds)." in line


def test_classes_and_groups(table):
    head, rows = report.classes(table)
    assert head == ["method", "says no %", "says yes %", "finds no %", "finds yes %"]
    assert rows[0] == ["(the test examples)", "50.0", "50.0", "-", "-"]
    assert rows[2][1:] == ["25.0", "75.0", "50.0", "87.5"]
    head, rows = report.groups(table)
    assert head == ["method", "accuracy on far [95 %]", "accuracy on near [95 %]"]
    assert [cells[0] for cells in rows] == ["good", "half", "stuck"]
    assert rows[0][1:] == ["0.5000 [0.4000, 0.6000]", "0.7500 [0.7000, 0.8000]"]
    assert rows[2][1:] == ["collapsed", "collapsed"]


def test_the_spreadsheet_has_every_figure(table):
    lines = list(csv.DictReader(report.spreadsheet([table]).splitlines()))
    assert [line["method"] for line in lines] == ["majority", "stuck", "half", "good"]
    good = lines[-1]
    known = {
        "optimizer.lr": 5e-4, "accuracy": 0.75, "accuracy low": 0.7, "difference": 0.1, "difference low": 0.0,
        "difference high": 0.2, "p adjusted": 0.04, "says yes": 0.75, "finds no": 0.5, "accuracy on far": 0.5,
        "accuracy on near high": 0.8, **MEASURED,
    }  # fmt: skip
    assert {name: float(good[name]) for name in known} == pytest.approx(known)
    assert lines[0]["accuracy on far"] == lines[0]["peak MB"] == lines[0]["optimizer.lr"] == ""
    assert {*COSTS} < {*good}


def test_every_plot_is_drawn_and_read_back(table, tmp_path):
    digest = Digest(("what was done",), "good", (table,))
    assert read(dumped(digest)).tables[0].rows[3].groups["near"] == Interval(0.75, 0.7, 0.8)
    plots = figures.draw(table, tmp_path)
    assert list(plots) == [
        "scores", "groups", "forgetting", "score against parameters", "parameters", "memory", "latency",
        "learning curves", "radar",
    ]  # fmt: skip
    page = report.page(digest, {0: plots})
    assert page.count("<svg") == len(plots)
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(set(ids)) == len(ids)  # no plot points at another's shapes
    figures.draw_one(table, "groups", tmp_path / "images" / "one.png")
    assert (tmp_path / "images" / "one.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no plot 'rader' of this table; there are scores, groups"):
        figures.draw_one(table, "rader", tmp_path / "no.png")


@pytest.mark.parametrize("methods, bands", [(8, True), (9, False)])
def test_curves_of_many_methods_have_no_bands(methods, bands, table):
    many = dataclasses.replace(table, rows=[row(f"m{i}", 0.6) for i in range(methods)])
    axes = Figure().subplots()
    assert figures._curves(axes, many)
    assert bool(axes.collections) == bands
    assert ("band:" in axes.get_xlabel()) == bands


def test_the_curve_of_few_examples_ends_with_all_rows(tmp_path, monkeypatch):
    """Each task and model has one of its own; what diverged everywhere is not on it, and what collapsed is hollow."""
    axes = []
    drawn = figures._drawn

    def kept(plot, data, folder, title):
        return drawn(lambda ax, of: (axes.append(ax), plot(ax, of))[1], data, folder, title)

    def table(task, size, accuracy, train_rows=None):
        lost = Row("lost", 0, 2, 0, {}, None, dict.fromkeys(COSTS), [])
        rows = [row("majority", 0.5), row("good", accuracy), lost, row("stuck", 0.5, collapsed=2)]
        return Table("tiny", task, size, "accuracy", True, 100, rows, {}, train_rows)

    tables = (table("a", None, 0.9, 1200), table("a", 16, 0.6), table("b", None, 0.8), table("b", 64, 0.7))
    monkeypatch.setattr(report.digests, "digested", lambda study, runs: Digest(("done",), "good", tables))
    monkeypatch.setattr(figures, "draw", lambda table, folder: folder.mkdir(parents=True) or {})
    monkeypatch.setattr(figures, "_drawn", kept)
    page = report.write(SimpleNamespace(out=str(tmp_path)), []).read_text()  # type: ignore[arg-type]
    assert page.count("<svg") == 2
    assert (tmp_path / "plots" / "b_on_tiny" / "few_examples.png").stat().st_size > 5000
    for ax, places, ticks, means in zip(
        axes, ([16, 1200], [64, 256]), (["16", "all\n1,200"], ["64", "all"]), ([0.6, 0.9], [0.7, 0.8]), strict=True
    ):
        assert ax.get_xticks().tolist() == places
        assert [text.get_text() for text in ax.get_xticklabels()] == ticks
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["good", "stuck"]
        assert ax.containers[0].lines[0].get_ydata().tolist() == means
        hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
        assert [len(line.get_xdata()) for line in hollow] == [0, 2]


@pytest.mark.parametrize("took, each", [((10.0, 42.0), 2.0), ((10.0, 9.0), None)])
def test_a_token_takes_no_negative_time(took, each, monkeypatch):
    """What else a machine does may make the longer generation the faster one: then a token's time is not known."""
    times = iter(took)
    monkeypatch.setattr(latency, "_timed", lambda call: next(times))
    monkeypatch.setattr(latency, "_ids", lambda model, length: [[1] * length])
    assert latency._decode(None, 64) == each


@pytest.mark.parametrize(
    "took, median",
    [((3.0, 5.0, 4.0), 4.0), ((3.0, None, 4.0), 4.0), ((3.0, None, None), None), ((3.0, None), None), ((), None)],
)
def test_the_time_to_a_target_counts_the_runs_that_never_reach_it(took, median):
    assert to_target([{"training": {"to_target_s": seconds}} for seconds in took]) == median
