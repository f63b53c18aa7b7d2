"""Quantities as a reader wants them: counts, bytes, durations, shares."""

NOT_MEASURED = "not measured"


def count_text(count: float | None) -> str:
    """A count in full below a million, else with three digits and a prefix."""
    if count is None:
        return NOT_MEASURED
    rounded = float(f"{count:.3g}")
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if rounded >= size:
            return f"{rounded / size:.3g} {prefix}"
    return f"{count:,.0f}"


def rate_text(rate: float | None) -> str:
    """A rate, whole from ten on."""
    if rate is None:
        return NOT_MEASURED
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def bytes_text(count: float | None) -> str:
    """A number of bytes with a binary prefix."""
    if count is None:
        return NOT_MEASURED
    for prefix, size in (
        ("TiB", 2**40),
        ("GiB", 2**30),
        ("MiB", 2**20),
        ("KiB", 2**10),
    ):
        if count >= size:
            return (
                f"{count / size:.3g} {prefix}"
                if count < 1000 * size
                else (f"{count / size:,.0f} {prefix}")
            )
    return f"{count:.0f} B"


def duration_text(seconds: float | None) -> str:
    """A duration in its two largest units."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def share_text(share: float | None) -> str:
    """A fraction as a percentage with two digits."""
    if share is None:
        return NOT_MEASURED
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.2g} %"
