# SPDX-License-Identifier: Apache-2.0
"""The page of conformance lists every method on every family, and what it measures can fail."""

import dataclasses
import json
import re

import conformance
import pytest
from conformance import LIMIT, PAGE, TABLES, Cell

import jpeft
from jpeft.io.peft import CODECS
from jpeft.models._families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def _tables():
    """title -> {method: {family: cell}}, and the numbers of the refusals."""
    text = PAGE.read_text(encoding="utf-8")
    tables = {}
    for title in TABLES:
        header, _, *rows = re.findall(r"^\|.*\|$", text.partition(f"## {title}\n")[2].partition("\n## ")[0], re.M)
        columns = [part.strip() for part in header.strip("|").split("|")][1:]
        cells = ([part.strip() for part in row.strip("|").split("|")] for row in rows)
        tables[title] = {kind: dict(zip(columns, values, strict=True)) for kind, *values in cells}
    return tables, {int(n) for n in re.findall(r"^(\d+)\. ", text.partition("## Refusals\n")[2], re.M)}


def test_the_page_lists_every_method_and_every_family():
    tables, _ = _tables()
    for table in tables.values():
        assert [*table] == [*jpeft.METHODS], "run `make conformance`"
        assert all([*cells] == [*FAMILIES] for cells in table.values()), "run `make conformance`"


def test_every_cell_is_within_the_limit_or_a_refusal_that_is_written_down():
    tables, reasons = _tables()
    referred = set()
    for title, table in tables.items():
        for kind, cells in table.items():
            refused = {int(cell.strip("[]")) for cell in cells.values() if cell.startswith("[")}
            measured = [float(cell) for cell in cells.values() if not cell.startswith("[")]
            assert all(value <= (0 if title == "There and back" else LIMIT) for value in measured), kind
            assert bool(measured) == (kind in CODECS), f"{kind}: run `make conformance`"
            referred |= refused
    assert referred == reasons


@pytest.mark.parametrize("kind, family", [("prompt_tuning", "bert cls"), ("prefix_tuning", "roberta cls")])
def test_a_cell_is_measured(kind, family):
    cell = conformance.measure(kind, family)
    for difference in (cell.exported, cell.imported):
        assert isinstance(difference, float), difference
        assert 0 < difference < LIMIT
    assert cell.again == 0


def test_a_refusal_is_told_in_its_words():
    refused = conformance.measure("bitfit", "bert cls")
    assert refused.exported.startswith("PEFT has no format for the adapter 'bitfit'")
    assert refused == Cell(*[refused.exported] * 3)


def test_what_is_above_the_limit_is_a_failure():
    cells = {("a", "x"): Cell(2e-5, 1e-6, 0), ("a", "y"): Cell(float("nan"), "no", 0), ("b", "x"): Cell(0.0, "no", 3)}
    assert [*conformance.failures(cells)] == [
        "a on x, exported: 2e-05", "a on y, exported: nan", "b on x, again: 3",
    ]  # fmt: skip
    page = conformance.render({place: cell for place, cell in cells.items() if place[1] == "x"})
    assert "| a | 2.0e-05 |" in page
    assert "| b | [1] |" in page
    assert "\n1. no\n" in page


@pytest.mark.parametrize("worst, status", [(1e-6, 0), (2e-5, "lora on bert, imported: 2e-05")])
def test_the_program_fails_where_a_cell_does(worst, status, tmp_path, monkeypatch):
    log = tmp_path / "log"
    cells = {family: Cell(1e-6, worst if family == "bert" else "no", 0) for family in FAMILIES}
    log.write_text("".join(f"lora {name} {json.dumps(dataclasses.asdict(cell))}\n" for name, cell in cells.items()))
    monkeypatch.setattr("sys.argv", ["conformance.py", "lora", "--log", str(log)])
    monkeypatch.setattr(conformance.logging, "disable", lambda level: None)
    with pytest.raises(SystemExit) as ended:
        conformance.main()
    assert ended.value.code == status
