# SPDX-License-Identifier: Apache-2.0
"""The pages of results say what their committed data say: every table is made again from docs/results/data."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for page in (ROOT / "docs" / "results").glob("*.md") if "<!-- end -->" in page.read_text())


@pytest.fixture(name="pages", scope="module")
def _pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "benchmarks" / "studies" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_pages():
    assert {page.stem for page in PAGES} >= {"pubmedqa", "rank_rate", "sentiment", "stories"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_what_its_data_say(page, pages):
    text = page.read_text()
    assert pages.written(text) == text, f"{page.name} is not what benchmarks/studies/pages.py makes of the data"
    for link in re.findall(r"]\((images/[^)]+)\)", text):
        assert (page.parent / link).stat().st_size > 5000


def test_a_figure_that_was_changed_by_hand_is_seen(pages):
    text = PAGES[0].read_text()
    assert pages.written(text.replace("| full |", "| fool |")) == text


def test_a_sweeps_page_has_its_tables_alone(pages):
    assert pages.block("rank_rate", "Points", None).count("| finished |") == 15
    with pytest.raises(KeyError, match="a sweep has the tables Protocol and Points, not Scores"):
        pages.block("rank_rate", "Scores", None)


def test_columns_are_chosen_by_whole_words(pages):
    head = ["method", "p", "precision [95 %]", "accuracy [95 %]", "accuracy - lora's [95 %]"]
    assert pages.chosen(head, ["p"]) == [0, 1]
    assert pages.chosen(head, ["accuracy"]) == [0, 3, 4]
    assert pages.chosen(head, ["accuracy [95 %]", "p"]) == [0, 1, 3]
    assert pages.chosen(head, [""]) == [0, 1, 2, 3, 4]


def test_a_column_that_is_not_there(pages):
    with pytest.raises(KeyError, match="no column begins with 'acuracy'; there are method, accuracy"):
        pages.chosen(["method", "accuracy [95 %]"], ["acuracy"])
