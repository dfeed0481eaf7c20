"""Curves of a study as inline SVG: one line a row over distances, lengths or positions.  No matplotlib."""

import math
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 190, 12, 34  # margins; the right one holds the legend
# Distinct in light and dark; a row keeps its colour in all pictures of a page, and its own dashes after ten.
COLOURS = (
    *("#1765b0", "#c2571a", "#2e8b57", "#8f4fb3", "#b8860b", "#d6336c", "#2a9d9d", "#7a7a7a", "#6b8e23", "#a0522d"),
)
DASHES = ("", "6 3", "2 3")


def curves(title: str, x_name: str, y_name: str, lines: dict[str, list[tuple[float, float]]], order: list[str]) -> str:
    """A <figure>: points (x, y) of each row, x on a logarithmic axis where all are above 0.

    `order` names all rows of the page, in the order of their colours.
    """
    points = [point for line in lines.values() for point in line]
    if len({x for x, _ in points}) < 2:
        return ""
    log = min(x for x, _ in points) > 0
    place = (lambda x: math.log2(x)) if log else (lambda x: x)
    left, right = (place(bound([x for x, _ in points])) for bound in (min, max))
    low, high, step = _nice([y for _, y in points])

    def at(x: float, y: float) -> str:
        across = LEFT + (place(x) - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    ticks = round((high - low) / step)
    for number in range(ticks + 1):
        y = low + number * step
        across, down = at(2**left if log else left, y).split(",")
        parts.append(f'<path d="M{across} {down}H{WIDTH - RIGHT}" stroke="var(--grid)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down}" dy=".32em" text-anchor="end">{y:.{_digits(step)}f}</text>')
    for x in _apart(sorted({x for x, _ in points}), place, right - left):
        across = at(x, low).split(",")[0]
        parts.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_name)}</text>'
    )
    for number, (name, line) in enumerate(lines.items()):
        index = order.index(name)
        look = (
            f'stroke="{COLOURS[index % len(COLOURS)]}" stroke-dasharray="{DASHES[index // len(COLOURS) % len(DASHES)]}"'
        )
        row = TOP + 8 + 16 * number
        path = " ".join(at(x, y) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke-width="1.8" {look}/>')
        parts.append(f'<path d="M{WIDTH - RIGHT + 12} {row}h20" stroke-width="2.5" {look}/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 38}" y="{row}" dy=".32em">{escape(name)}</text>')
    tall = max(HEIGHT, TOP + 16 * (len(lines) + 1))
    return (
        f"<figure><figcaption>{escape(title)}: {escape(y_name)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {tall}" role="img" aria-label="{escape(title)}" font-size="11" '
        f'fill="currentColor">{"".join(parts)}</svg></figure>'
    )


def _nice(values: list[float]) -> tuple[float, float, float]:
    """Bounds and step of an axis that holds the values, in four to eight round steps."""
    least, most = min(values), max(values)
    span = (most - least) or abs(most) or 1.0
    power = 10 ** math.floor(math.log10(span))
    step = next(power * part for part in (0.1, 0.2, 0.25, 0.5, 1, 2) if span / (power * part) <= 6)
    return math.floor(least / step) * step, math.ceil(most / step + 1e-9) * step, step


def _digits(step: float) -> int:
    """Decimals that tell steps apart."""
    return next(digits for digits in range(9) if abs(round(step, digits) - step) < 1e-9 * step or digits == 8)


def _apart(values: list[float], place, span: float) -> list[float]:
    """Those values whose labels do not run into each other."""
    kept = [values[0]]
    for value in values[1:]:
        if (place(value) - place(kept[-1])) / span > 0.085:
            kept.append(value)
    return kept
