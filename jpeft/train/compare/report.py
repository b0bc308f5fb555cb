# SPDX-License-Identifier: Apache-2.0
"""The report of a study: Markdown, CSV, one HTML page that needs no other file, and report.json, which holds all that
the others show, so that they can be written from it again where the runs are not.
"""

import csv
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models._files import write_text
from . import digest as digests
from . import figures
from .digest import Digest
from .runner import Done
from .study import Study
from .table import COSTS, Row, Table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 84rem;
       padding: 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; padding-bottom: .3rem; }
/* borders of their own: collapsed ones do not move with a column that stays */
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #333; } .flag { font-weight: 600; }
figure { margin: 1.5rem 0; overflow-x: auto; } figcaption { font-weight: 600; position: sticky; left: 0; }
figure svg { width: 100%; height: auto; min-width: 38rem; max-width: 56rem; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def write(study: Study, runs: Sequence[Done]) -> Path:
    """Writes report.md, report.html, report.csv, report.json and plots/ into the study's folder; gives the page.

    Raises:
      ValueError: there is nothing to report.
    """
    out, digest = Path(study.out), digests.digested(study, runs)
    plots = {at: figures.draw(table, out / "plots" / slug(table)) for at, table in enumerate(digest.tables)}
    for at, table in enumerate(digest.tables):
        same = [t for t in digest.tables if (t.task, t.model) == (table.task, table.model)]
        if table.size is None and (few := figures.few_examples(same, out / "plots" / slug(table))) is not None:
            plots[at]["few examples"] = few
    write_text(out / "report.json", digests.dumped(digest))
    write_text(out / "report.md", markdown(digest, plots, out))
    write_text(out / "report.csv", spreadsheet(digest.tables))
    write_text(out / "report.html", page(digest, plots))
    return out / "report.html"


def markdown(digest: Digest, plots: Mapping[int, Mapping[str, Path]], out: Path) -> str:
    """The report as Markdown, with links to the plots."""
    lines = ["# Comparison of methods", ""]
    lines += [*(f"- {line}" for line in digest.protocol), ""]
    for at, table in enumerate(digest.tables):
        lines += [f"## {_title(table)}", "", *(f"- {line}" for line in flags(table)), ""]
        for part in parts(table, digest.reference).values():
            lines += [*marked(*part), ""]
        lines += [f"![{title}]({file.relative_to(out)})" for title, file in plots[at].items()] + [""]
    return "\n".join(lines)


def marked(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, by lines."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]


def spreadsheet(found: Sequence[Table]) -> str:
    """All figures of every table, one line for each method; what was not measured is empty."""
    lines = [_line(table, row) for table in found for row in table.rows]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _line(table: Table, row: Row) -> dict[str, Any]:
    """A method's figures by column."""
    line: dict[str, Any] = {
        "task": table.task, "model": table.model, "rows": table.size or "all", "method": row.method, **row.chosen,
        "seeds": row.seeds, "diverged": row.diverged, "collapsed": row.collapsed,
    }  # fmt: skip
    for name, interval in row.scores.items():
        line |= _bounds(name, interval)
    if row.apart is not None:
        line |= _bounds("difference", row.apart.interval) | {"p adjusted": row.apart.p}
    for name, (said, recall) in row.classes.items():
        line |= {f"says {name}": said, f"finds {name}": recall}
    for name, interval in row.groups.items():
        line |= _bounds(f"{table.main} on {name}", interval)
    return {**line, **row.costs}


def _bounds(name: str, interval: tuple[float, float, float]) -> dict[str, float]:
    """A figure and its interval, a column each."""
    return dict(zip((name, f"{name} low", f"{name} high"), interval, strict=True))


def page(digest: Digest, plots: Mapping[int, Mapping[str, Path]]) -> str:
    """The report as one HTML page with its plots in it."""
    body = ["<h1>Comparison of methods</h1>", _items(digest.protocol)]
    for at, table in enumerate(digest.tables):
        body.append(f"<h2>{html.escape(_title(table))}</h2>")
        body += [f'<p class="flag">{html.escape(line)}</p>' for line in flags(table)]
        for title, part in parts(table, digest.reference).items():
            body += [f"<h3>{title}</h3>", _table(*part)]
        body += [_figure(title, file) for title, file in plots[at].items()]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head><title>Comparison of methods</title>{head}</head><body>' + "\n".join(
        [*body, "</body></html>\n"]
    )


def flags(table: Table) -> list[str]:
    """What keeps a figure from being read as a score."""
    collapsed = ", ".join(f"{row.method} ({row.collapsed} of {row.seeds} seeds)" for row in table.rows if row.collapsed)
    diverged = ", ".join(f"{row.method} ({row.diverged} seeds)" for row in table.rows if row.diverged)
    lines = {
        f"Collapsed: {collapsed}. One class is predicted for every example; what that gives is the class's frequency "
        "and no score.": collapsed,
        f"Diverged: {diverged}. These runs are left out of the figures.": diverged,
    }
    return [line for line, there in lines.items() if there]


def parts(table: Table, reference: str) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The tables of a table by title, each a head and rows, of what there is."""
    found = {
        "Scores": scores(table, reference),
        "Classes": classes(table),
        "Groups": groups(table),
        "Costs": costs(table),
    }
    return {title: part for title, part in found.items() if part[1]}


def scores(table: Table, reference: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of scores; best first below the baselines, and last what has no score."""
    names = list(dict.fromkeys(name for row in table.rows for name in row.scores))
    keys = list(dict.fromkeys(key for row in table.rows for key in row.chosen))
    head = ["method", *(key.rpartition(".")[2] for key in keys), *(f"{name} [95 %]" for name in names)]
    head += [f"{table.main} - {reference}'s [95 %]", "p", "seeds"]
    rows = []
    for row in _ranked(table):
        chosen = [
            f"{row.chosen[key]:g}" if isinstance(row.chosen.get(key), float) else str(row.chosen.get(key, "-"))
            for key in keys
        ]
        lost = "collapsed" if row.all_collapsed else "-"
        cells = [_interval(row.scores[name]) if row.scores and not row.all_collapsed else lost for name in names]
        apart = (
            ("-", "-")
            if row.apart is None or row.all_collapsed
            else (_signed(row.apart.interval), f"{row.apart.p:.3f}")
        )
        seeds = f"{row.seeds}" + (f", {row.collapsed} collapsed" if row.collapsed else "")
        rows.append(
            [row.method, *chosen, *cells, *apart, seeds + (f", {row.diverged} diverged" if row.diverged else "")]
        )
    return head, rows


def classes(table: Table) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what a classifier predicts and finds of each class; first what there is."""
    head = ["method", *(f"says {name} %" for name in table.truth), *(f"finds {name} %" for name in table.truth)]
    rows = [
        [row.method, *(f"{100 * x:.1f}" for at in (0, 1) for x in (row.classes[name][at] for name in table.truth))]
        for row in _ranked(table)
        if row.classes
    ]
    truth = [
        "(the test examples)",
        *(f"{100 * share:.1f}" for share in table.truth.values()),
        *("-" for _ in table.truth),
    ]
    return head, [truth, *rows] if rows else []


def groups(table: Table) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the main figure on every group of the test examples."""
    names = list(dict.fromkeys(name for row in table.rows for name in row.groups))
    rows = [
        [row.method, *("collapsed" if row.all_collapsed else _interval(row.groups[name]) for name in names)]
        for row in _ranked(table)
        if row.groups
    ]
    return ["method", *(f"{table.main} on {name} [95 %]" for name in names)], rows


def costs(table: Table) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of costs, of what was measured."""
    shown = [name for name in COSTS if any(row.costs[name] is not None for row in table.rows)]
    rows = [[row.method, *(_cost(name, row.costs[name]) for name in shown)] for row in _ranked(table)]
    return ["method", *shown], [row for row in rows if any(cell != "-" for cell in row[1:])]


def _ranked(table: Table) -> list[Row]:
    sign = -1 if table.more_is_better else 1
    worst = float("inf")
    merit = {row.method: sign * row.scores[table.main].mean if row.scores else worst for row in table.rows}
    return sorted(table.rows, key=lambda row: (not row.is_baseline, row.all_collapsed, merit[row.method]))


def _interval(value: tuple[float, float, float]) -> str:
    mean, low, high = value
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def _signed(value: tuple[float, float, float]) -> str:
    mean, low, high = value
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _cost(name: str, value: float | None) -> str:
    return "-" if value is None else format(value, COSTS[name][1])


def _title(table: Table) -> str:
    return f"{table.task} on {table.model}" + ("" if table.size is None else f", {table.size:,} training rows")


def slug(table: Table) -> str:
    """Its title as a file's name."""
    return re.sub(r"[^\w-]+", "_", _title(table))


def _items(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _figure(title: str, file: Path) -> str:
    """The SVG itself; its ids are made its own, for a page holds many."""
    svg = file.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    own = re.sub(r"[^\w]+", "_", f"{file.parent.name}_{file.stem}")
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{own}-", svg)
    svg = re.sub(r"<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', svg, count=1)
    return f"<figure><figcaption>{html.escape(title.capitalize())}</figcaption>{svg}</figure>"
