"""Charts as SVG whose colours come from the page around them."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from conjopt.report.digest import CONDITION_STATES
from conjopt.report.panels import Chart, Line
from conjopt.report.series import Numbers, thinned

__all__ = ["COLOURS", "DASHES", "chart", "clean", "number", "sample"]

COLOURS = 6  # variables --c0 to --c5 of the page
DASHES = ("none", "7 3", "2 3", "10 3 2 3", "14 4")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 220, 52, 10, 14, 30
ROW = 24  # of bands
POINTS = 900  # of a line: as many as there are places for
MARKS = 40  # of a line, for what set each point
FEW = 40  # points that are marked by dots, as a line through few says little
BAD = {"nan": "not a number", "inf": "infinite", "-inf": "minus infinity"}


def clean(text: object) -> str:
    """Text of a record for a page: escaped, and without what no page can hold.

    Example:
        >>> clean('<b> & "x"' + chr(0))
        '&lt;b&gt; &amp; &quot;x&quot;�'
    """
    kept = "".join(
        c if c.isprintable() or c == " " else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    )
    return html.escape(kept, quote=True)


def number(value: float) -> str:
    """A number in few characters.

    Example:
        >>> number(0.5), number(12345), number(1e-7), number(20000)
        ('0.5', '12.3k', '1e-7', '20k')
    """
    if 1e3 <= abs(value) < 1e9:
        for size, suffix in ((1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def chart(what: Chart, name: str) -> str:
    """One chart.

    Args:
        what: to draw.
        name: unique on the page, for the ids of its title and description.

    Returns:
        an ``<svg>`` element that scales with its width.
    """
    lines = [line for line in what.lines if line.series.count]
    span = _span([line.series.x for line in lines] + _bad(lines))
    if what.bands:
        height = TOP + ROW * len(lines) + BOTTOM
        inner = _bands(lines, span)
    else:
        height = HEIGHT
        inner = _lines(what, lines, span)
    bottom = height - BOTTOM
    axis = [
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>',
        *(
            f'<text x="{_x(tick, span):.1f}" y="{bottom + 15}" text-anchor="middle">'
            f"{number(tick)}</text>"
            for tick in _nice(*span, 5)
        ),
        f'<text x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">{clean(what.x)}</text>',
    ]
    described = "; ".join(_describe(line, what.bands) for line in lines[:12])
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{clean(what.title)} against {clean(what.x)}</title>'
        f'<desc id="{name}-d">{described}</desc>' + "".join(inner) + "".join(axis) + "</svg>"
    )


def sample(line: Line) -> str:
    """A piece of a line, or of a faint one, for a legend."""
    return (
        '<svg class="key" viewBox="0 0 34 12" aria-hidden="true">'
        f'<path class="{_style(line)}" d="M1 6H33"/></svg>'
    )


def mark(code: int, x: float = 17, y: float = 6) -> str:
    """The mark of a limit: its colour and its shape."""
    shapes = (
        "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1 -4 0Z",  # circle
        "M-3.5 -3.5H3.5V3.5H-3.5Z",  # square
        "M0 -4.5L4.2 3.2H-4.2Z",  # triangle up
        "M0 -5L4.5 0L0 5L-4.5 0Z",  # diamond
        "M0 4.5L4.2 -3.2H-4.2Z",  # triangle down
        "M-4 -1.3H-1.3V-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4Z",  # plus
    )
    shape = shapes[code % len(shapes)]
    colour = (code + 1) % COLOURS
    return f'<path class="m f{colour}" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'


def bad_mark(kind: str, x: float, y: float) -> str:
    """A cross for what is no number, and triangles for infinities."""
    shapes = {
        "nan": "M-3.5 -3.5L3.5 3.5M3.5 -3.5L-3.5 3.5",
        "inf": "M-3.5 3L0 -4L3.5 3Z",
        "-inf": "M-3.5 -3L0 4L3.5 -3Z",
    }
    return f'<path class="bad" transform="translate({x:.1f} {y:.1f})" d="{shapes[kind]}"/>'


def _style(line: Line) -> str:
    if line.limits and line.group:  # a part of a run: the colours are those of the limits
        return f"l part d{line.style % len(DASHES)}"
    if line.style < 0:
        code = -1 - line.style
        return f"l s{(code + 1) % COLOURS} faint d{1 + code % (len(DASHES) - 1)}"
    return f"l s{line.style % COLOURS} d{line.style % len(DASHES)}"


def _lines(what: Chart, lines: Sequence[Line], span: tuple[float, float]) -> list[str]:
    ys = [y[y > 0] if what.log else y for y in (line.series.y for line in lines)]
    to_y, ticks = _scale(ys, what.log)
    drawn = []
    for tick in ticks:
        at = to_y(np.array([tick]))[0]
        drawn.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for line in lines:
        drawn += _line(line, what.log, span, to_y)
    for line in lines:
        for kind in line.series.bad:
            at = HEIGHT - BOTTOM - 5 if kind == "-inf" else TOP - 7
            before = -math.inf
            for x in sorted(_to_x(line.series.bad_places(kind), span)):
                if x - before >= 8:  # or they would be a blob
                    drawn.append(bad_mark(kind, x, at))
                    before = x
    return drawn


def _line(
    line: Line, log: bool, span: tuple[float, float], to_y: Callable[[Numbers], Numbers]
) -> list[str]:
    series = line.series
    x, y, code = series.x, series.y, series.code
    if log:
        x, y, code = x[y > 0], y[y > 0], code[y > 0]
    if not x.size:
        return []
    if x.size > POINTS:
        kept = thinned(np.arange(float(x.size)), y, POINTS)
        x, y, code = x[kept], y[kept], code[kept]
    px, py = _to_x(x, span), to_y(y)
    # A line does not run on over places without a number, nor back to a step before.
    jump = np.zeros(x.size, dtype=bool)
    jump[0] = True
    jump[series.gaps(x)] = True
    if not line.limits:
        drawn = [f'<path class="{_style(line)}" d="{_path(px, py, jump)}"/>']
        dots = np.arange(x.size) if x.size <= FEW else series.alone(x)
        if line.style >= 0:
            drawn += [
                f'<circle class="f{line.style % COLOURS}" cx="{px[i]:.1f}" cy="{py[i]:.1f}" '
                'r="2.4"/>'
                for i in dots[:: max(1, math.ceil(dots.size / FEW))]
            ]
        return drawn
    if line.group:  # dashes tell the parts of a run apart, and need room between the marks
        drawn = [f'<path class="{_style(line)}" d="{_path(px, py, jump)}"/>']
        marks = MARKS // 3
    else:
        drawn = _pieces(px, py, code, jump, len(line.limits))
        marks = MARKS
    every = max(1, math.ceil(x.size / marks))
    marked = set(range(0, x.size, every)) | {x.size - 1}
    for number_, _ in enumerate(line.limits):  # one that is rare is marked, too
        marked |= set(np.flatnonzero(code == number_)[:3].tolist())
    return drawn + [mark(int(code[i]), px[i], py[i]) for i in sorted(marked) if code[i] >= 0]


def _pieces(
    px: Numbers, py: Numbers, code: Numbers, jump: NDArray[np.bool_], limits: int
) -> list[str]:
    """A line, each piece in the colour of what set its end."""
    drawn = []
    for colour in range(limits + 1):
        mine = code[1:] < 0 if not colour else code[1:] == colour - 1
        of = np.flatnonzero(mine & ~jump[1:])
        if of.size:
            pieces = "".join(
                f"M{px[i]:.1f} {py[i]:.1f}L{px[i + 1]:.1f} {py[i + 1]:.1f}" for i in of
            )
            drawn.append(f'<path class="l s{colour % COLOURS}" d="{pieces}"/>')
    return drawn


def _path(px: Numbers, py: Numbers, jump: Sequence[bool] | Numbers) -> str:
    return "".join(
        f"{'M' if first else 'L'}{a:.1f} {b:.1f}" for a, b, first in zip(px, py, jump, strict=True)
    )


def _bands(lines: Sequence[Line], span: tuple[float, float]) -> list[str]:
    """A row for each condition: a line where it is unknown, a bar where it holds, a block else."""
    drawn = []
    for row, line in enumerate(lines):
        middle = TOP + ROW * row + ROW / 2
        drawn.append(
            f'<text x="{LEFT - 5}" y="{middle + 4}" text-anchor="end">{clean(line.name[:7])}</text>'
        )
        x, y = line.series.x, line.series.y
        if x.size > POINTS:
            kept = thinned(np.arange(float(x.size)), y, POINTS)
            x, y = x[kept], y[kept]
        starts = np.flatnonzero(np.diff(y, prepend=-1.0))
        ends = np.append(x[starts[1:]], span[1])
        # Failures last, so that a short one is not painted over.
        for start, end in sorted(zip(starts, ends, strict=True), key=lambda pair: y[pair[0]]):
            state = CONDITION_STATES[int(y[start])]
            size = {"unknown": 2, "holds": 9, "fails": ROW - 5}[state]
            left, right = _x(x[start], span), _x(end, span)
            drawn.append(
                f'<rect class="{state}" x="{left:.1f}" y="{middle - size / 2:.1f}" '
                f'width="{max(right - left, 2):.1f}" height="{size}"/>'
            )
    return drawn


def _describe(line: Line, band: bool) -> str:
    series = line.series
    if band:
        return f"{clean(line.name)}: {CONDITION_STATES[int(series.y[-1])]} at the end"
    if not series.y.size:
        return f"{clean(line.name)}: no finite number"
    return (
        f"{clean(line.name)}: from {number(series.y[0])} to {number(series.y[-1])}, "
        f"between {number(series.y.min())} and {number(series.y.max())}"
    )


# Axes.


def _bad(lines: Iterable[Line]) -> list[Numbers]:
    return [line.series.bad_places(kind) for line in lines for kind in line.series.bad]


def _span(values: Sequence[Numbers]) -> tuple[float, float]:
    every = np.concatenate(values) if values else np.empty(0)
    if not every.size:
        return 0.0, 1.0
    low, high = float(every.min()), float(every.max())
    return (low - 0.5, high + 0.5) if low == high else (low, high)


def _to_x(x: Numbers, span: tuple[float, float]) -> Numbers:
    placed: Numbers = LEFT + (x - span[0]) / (span[1] - span[0]) * (WIDTH - LEFT - RIGHT)
    return placed


def _x(x: float, span: tuple[float, float]) -> float:
    return float(_to_x(np.array([x]), span)[0])


def _scale(
    values: Sequence[Numbers], log: bool
) -> tuple[Callable[[Numbers], Numbers], list[float]]:
    """From values to places on the page, and where to put ticks."""
    every = np.concatenate(values) if values else np.empty(0)
    low, high = (float(every.min()), float(every.max())) if every.size else (1.0, 2.0)
    size = max(abs(low), abs(high)) or 1.0  # so that no difference overflows
    if log:
        low, high = math.log10(low), math.log10(high)
        size = 1.0
    low, high = low / size, high / size
    room = 0.06 * (high - low) or 0.1 * max(abs(high), 1.0)
    low, high = low - room, high + room

    def to_y(y: Numbers) -> Numbers:
        at = (np.log10(y) if log else y / size) - low
        placed: Numbers = HEIGHT - BOTTOM - at / (high - low) * (HEIGHT - BOTTOM - TOP)
        return placed

    if not every.size:
        return to_y, []  # there is no number to read off
    if log:
        return to_y, _decades(low, high)
    wide = (high - low) * size
    if wide > 1e-300 and all(map(math.isfinite, (low * size, high * size, wide))):
        return to_y, _nice(low * size, high * size, 5)
    return to_y, [t * size for t in _nice(low, high, 5)]


def _nice(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between two exponents, and their 2- and 5-fold where these are few."""
    first, last = math.ceil(low), math.floor(high)
    every = max(1, math.ceil((last - first + 1) / 6))
    found = [10.0**e for e in range(first, last + 1, every) if -320 < e < 309]
    if len(found) < 3:
        more = [
            m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5) if -300 < e < 300
        ]
        found = [t for t in more if low <= math.log10(t) <= high]
    if len(found) < 2 and high < 300:
        found = [t for t in _nice(10.0**low, 10.0**high, 4) if t > 0]
    return found
