"""A history as one page that needs nothing but itself."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conjopt.report.digest import Digest, Run, digest, run_file
from conjopt.report.history import History
from conjopt.report.panels import Chart, Panel, label, panels
from conjopt.report.svg import BAD, bad_mark, chart, clean, mark, number, sample
from conjopt.report.words import HINT, LOSSES, counted, sentences

__all__ = ["page", "write", "write_html"]

# Okabe and Ito's hues; darker on white and lighter on black, so that each stands out. Lines differ
# by their dashes and marks by their shapes as well.
STYLE = """
:root { color-scheme: light dark;
  --bg: #ffffff; --card: #f6f6f3; --ink: #1b1b1b; --muted: #515151; --grid: #dedede; --axis: #777;
  --c0: #0068a8; --c1: #b84a00; --c2: #007a57; --c3: #a3437b; --c4: #7a5b00; --c5: #3a3a3a;
  --holds: #0068a8; --fails: #b84a00; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #121418; --card: #1c1f25; --ink: #ededed; --muted: #b6bac2; --grid: #363a42;
  --axis: #8b9099;
  --c0: #5cb8ee; --c1: #ff8f52; --c2: #2fcb9d; --c3: #eaa6cf; --c4: #f0c542; --c5: #d6d6d6;
  --holds: #5cb8ee; --fails: #ff8f52; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 110rem; background: var(--bg); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .15rem; }
p { margin: 0 0 .75rem; max-width: 48rem; }
header { margin-bottom: 1.5rem; } section { margin-bottom: .75rem; }
section > p, footer, .notes { color: var(--muted); }
header ul { margin: .5rem 0 0; padding-left: 1.2rem; max-width: 60rem; }
main, .charts { display: grid; gap: 1rem; align-items: start; grid-template-columns: 1fr; }
main { column-gap: 1.5rem; grid-auto-flow: dense; }
@media (min-width: 46rem) {
  main, .n2 .charts, .n3 .charts, .n4 .charts { grid-template-columns: repeat(2, 1fr); }
  .n2, .n3, .n4, .last { grid-column: span 2; } }
@media (min-width: 70rem) {
  main, .n3 .charts, .n4 .charts { grid-template-columns: repeat(3, 1fr); }
  .n3, .n4, .last { grid-column: span 3; } }
@media (min-width: 92rem) {
  main, .n4 .charts { grid-template-columns: repeat(4, 1fr); }
  .n4, .last { grid-column: span 4; } }
section { min-width: 0; }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; min-width: 0; }
figure > svg { display: block; width: 100%; max-width: 40rem; height: auto;
  overflow: visible; }
svg text { font-size: 12px; fill: var(--muted); }
.key { width: 34px; height: 12px; vertical-align: -1px; margin-right: .35rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .35rem 0 0;
  padding: 0; font-size: .85rem; }
.notes { font-size: .85rem; margin: .35rem 0 0; }
.grid { stroke: var(--grid); stroke-width: 1; }
.axis { stroke: var(--axis); stroke-width: 1; }
.l { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1.1; opacity: .75; }
.part { stroke: var(--muted); stroke-width: 1.2; }
.m { stroke: var(--card); stroke-width: .7; }
.bad { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.unknown { fill: var(--axis); } .holds { fill: var(--holds); } .fails { fill: var(--fails); }
.d1 { stroke-dasharray: 7 3; } .d2 { stroke-dasharray: 2 3; } .d3 { stroke-dasharray: 10 3 2 3; }
.d4 { stroke-dasharray: 14 4; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.s3 { stroke: var(--c3); } .s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); }
.f3 { fill: var(--c3); } .f4 { fill: var(--c4); } .f5 { fill: var(--c5); }
.table { overflow-x: auto; } .table:focus-visible { outline: 2px solid var(--c0); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; white-space: nowrap; }
th, dt { font-weight: 600; }
dl { margin: 0; display: grid; column-gap: 1.5rem; font-size: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
dl div { display: flex; justify-content: space-between; gap: 1rem; padding: .2rem 0;
  border-bottom: 1px solid var(--grid); }
dd { margin: 0; flex: none; max-width: 60%; text-align: right; font-variant-numeric: tabular-nums; }
"""


def write_html(
    history: History | str | os.PathLike[str] | Iterable[dict[str, Any]],
    file: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> None:
    """Write a history as one HTML file that needs no network, for any width, light and dark.

    It has panels for what the history holds, sentences on where the run stands, and the last
    record. A million records make a page of the same size as a thousand. The file appears whole or
    not at all.

    Args:
        history: a `History`, with all that its file holds; the path of a history, or of a folder
            with one; or records.
        file: the page, replaced if it is there; its folder has to be.
        title: of the page; None for the name of the run.

    Raises:
        TypeError: if the history is of another kind, or one of the records is; or if the file is no
            path.
        ValueError: if the history is of another schema or version, or damaged; or if the page would
            take the place of the history.
        OSError: if a file cannot be read or written.

    Example:
        >>> import tempfile
        >>> history = History(Path(tempfile.mkdtemp()) / "history.jsonl")
        >>> for step in range(1, 100):
        ...     history.record(step=step, loss=1 / step, step_size=0.1)
        >>> write_html(history, history.path.with_name("report.html"))
        >>> page = history.path.with_name("report.html").read_text(encoding="utf-8")
        >>> page.count("<svg viewBox"), "://" in page
        (2, False)
    """
    if not isinstance(file, str | os.PathLike):
        raise TypeError(
            f"write_html: got a {type(file).__name__} as file, expected the path of the page"
        )
    path = history.path if isinstance(history, History) else history
    name = "Run"
    if isinstance(path, str | os.PathLike):
        path = run_file(path)
        if os.path.exists(file) and os.path.samefile(path, file):
            raise ValueError(f"{os.fspath(file)} is the history itself; give another file")
        name = run_name(path)
    write(page(digest(history), name if title is None else title), Path(file))


def run_name(path: Path) -> str:
    """What to call the run of a file: its folder, and its name where that is its own.

    Example:
        >>> run_name(Path("out/history.jsonl")), run_name(Path("out/seed 1.jsonl"))
        ('out', 'seed 1')
    """
    usual = path.stem in ("history", "metrics")
    return (path.absolute().parent.name or path.stem) if usual else path.stem


def page(found: Digest, title: str) -> str:
    """The page of a digest.

    Args:
        found: of a history.
        title: of the page.
    """
    shown = panels(found)
    parts = [_header(found, title)]
    if not shown:
        parts.append(f"<section><h2>Nothing to draw</h2><p>{clean(HINT)}</p></section>")
    parts.append("<main>")
    parts += [_panel(panel) for panel in shown]
    parts += [_table(found.runs), "</main>"]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Whatever a record may hold, nothing runs and nothing is fetched.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        # An empty icon, or a browser asks for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{clean(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def write(text: str, path: Path) -> None:
    """Write text to a file, whole or not at all.

    Args:
        text: half of a surrogate pair, which no file can hold, becomes a question mark.
        path: the file.

    Raises:
        OSError: if it cannot be written.
    """
    content = text.encode("utf-8", "replace")
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            why = f"{os.strerror(errno.EISDIR)}; give a file, such as report.html in it"
            raise IsADirectoryError(errno.EISDIR, why, os.fspath(path))
        if not stat.S_ISREG(mode):
            path.write_bytes(content)  # a pipe or a device, which is not to be replaced
            return
    temporary = path.with_name(f".conjopt-{os.getpid()}.tmp")  # whatever the length of its name
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # the name of a temporary file would tell nobody anything
            raise _unwritten(error, path) from error
        raise


def _unwritten(error: OSError, path: Path) -> OSError:
    why = error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        why += f"; make the folder {path.parent} first, or give a file in another one"
    return OSError(error.errno, why, os.fspath(path))


def _header(found: Digest, title: str) -> str:
    told = "".join(f"<li>{clean(sentence)}</li>" for sentence in sentences(found, each=False))
    return f"<header><h1>{clean(title)}</h1><ul>{told}</ul></header>"


def _panel(panel: Panel) -> str:
    figures = "".join(_figure(one, f"{panel.name}-{i}") for i, one in enumerate(panel.charts))
    return (
        f'<section class="n{min(len(panel.charts), 4)}" id="{panel.name}" '
        f'aria-labelledby="{panel.name}-h">'
        f'<h2 id="{panel.name}-h">{clean(panel.title)}</h2><p>{clean(panel.text)}</p>'
        f'<div class="charts">{figures}</div></section>'
    )


def _figure(one: Chart, name: str) -> str:
    scale = " (logarithmic)" if one.log else ""
    notes = "".join(f'<p class="notes">{note}</p>' for note in [*map(clean, one.notes), *_bad(one)])
    drawn = f"<h3>{clean(one.title)}{scale}</h3>{chart(one, name)}{_legend(one)}"
    return f"<figure>{drawn}{notes}</figure>"


def _legend(one: Chart) -> str:
    if one.bands:
        rows = (("unknown", 2), ("holds", 9), ("fails", 12))
        items = [
            f'<svg class="key" viewBox="0 0 34 12" aria-hidden="true"><rect class="{state}" x="2" '
            f'width="30" y="{6 - size / 2}" height="{size}"/></svg>{state}'
            for state, size in rows
        ]
    else:
        items = []
        if len(one.lines) > 1:
            named: dict[int, tuple[str, Any]] = {}
            for line in one.lines:
                if not line.limits or line.group:
                    named.setdefault(line.style, (line.group or line.name, line))
            items = [f"{sample(line)}{clean(text)}" for text, line in named.values()]
        # Parts of one run share the codes, of which the last part has all.
        limits = dict(pair for line in one.lines for pair in enumerate(line.limits))
        items += [
            '<svg class="key" viewBox="0 0 34 12" aria-hidden="true">'
            f"{mark(code)}</svg>set by {clean(name)}"
            for code, name in limits.items()
        ]
    if not items:
        return ""
    return '<ul class="legend">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _bad(one: Chart) -> list[str]:
    notes = []
    for kind, words in BAD.items():
        names = [
            f"{clean(line.name)} in {counted(line.series.bad[kind], 'record')}"
            for line in one.lines
            if kind in line.series.bad
        ]
        if names:
            key = f'<svg class="key" viewBox="0 0 34 12" aria-hidden="true">{bad_mark(kind, 17, 6)}'
            notes.append(f"{key}</svg>{words}: {', '.join(names[:8])}")
    return notes


def _table(runs: list[Run]) -> str:
    if not runs:
        return ""
    if len(runs) == 1:
        rows = "".join(
            f"<div><dt>{clean(label(key) if '/' not in key else key)}</dt>"
            f"<dd>{_cell(value)}</dd></div>"
            for key, value in runs[0].latest.items()
        )
        return (
            '<section class="last" aria-labelledby="last-h"><h2 id="last-h">The last values</h2>'
            f"<dl>{rows}</dl></section>"
        )
    keys = [*LOSSES, "test_accuracy", "step_size", "limited_by", "skipped_steps"]
    keys = [key for key in keys if any(key in run.latest for run in runs)]
    head = "".join(f'<th scope="col">{clean(label(key))}</th>' for key in keys)
    rows = "".join(
        f'<tr><th scope="row">{clean(run.name or "unnamed")}</th><td>{run.records:,}</td>'
        f"<td>{run.last:,.0f}</td>"
        + "".join(f"<td>{_cell(run.latest.get(key))}</td>" for key in keys)
        + "</tr>"
        for run in runs
    )
    return (
        '<section class="last" aria-labelledby="last-h"><h2 id="last-h">The last values</h2>'
        '<div class="table" tabindex="0" role="region" aria-labelledby="last-h"><table>'
        f'<tr><th scope="col">run</th><th scope="col">records</th>'
        f'<th scope="col">last {runs[0].x}</th>'
        f"{head}</tr>{rows}</table></div></section>"
    )


def _cell(value: object) -> str:
    if value is None:
        return "—"
    if isinstance(value, float):
        return clean(number(value) if abs(value) >= 1e4 else f"{value:.6g}")
    return clean(value)
