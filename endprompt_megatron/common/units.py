"""Numbers with their units for people to read: durations, sizes, plain numbers."""


def format_number(value: float) -> str:
    """Three digits, thousands apart: 0.0042, 1.23, 45.6, 1,234."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"


def format_count(count: int) -> str:
    """A count of parameters or tokens: 8.03B, 134.5M, 4.0k, 20."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.{2 if unit == 'B' else 1}f}{unit}"
    return str(count)


def format_duration(seconds: float) -> str:
    """Seconds in the unit that suits them: 12.3 ms, 42 s, 12.5 min, 5.1 h, 3.2 days."""
    if seconds < 1:
        return f"{format_number(1000 * seconds)} ms"
    for size, unit, at_least in ((86400, "days", 72 * 3600), (3600, "h", 7200), (60, "min", 120)):
        if seconds >= at_least:
            return f"{format_number(seconds / size)} {unit}"
    return f"{format_number(seconds)} s"


def format_bytes(count: float) -> str:
    """A number of bytes in decimal units, as disks are sold: 272.3 MB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} bytes" if units[0] == "bytes" else f"{count:.1f} {units[0]}"
