"""Quantities with units: bytes and tokens, written and read as people write them ("20GiB", "1.5k tokens")."""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_SUFFIXES = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024**4,
}


def parse_bytes(text: str | int) -> int:
    """Read a number of bytes: ``"20GiB"``, ``"500 MB"``, ``"1.5g"`` or a plain integer.

    Decimal suffixes (kB, MB, GB, TB) are powers of 1000, binary ones (KiB, MiB, GiB, TiB) powers of 1024.

    Raises:
        ValueError: the text is not a non-negative number with one of these suffixes.
    """
    if isinstance(text, int):
        value, suffix = float(text), ""
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
        if match is None or match.group(2).lower() not in _SUFFIXES:
            raise ValueError(f"{text!r} is not a number of bytes; write it like 20GiB, 500MB or 1000000")
        value, suffix = float(match.group(1)), match.group(2).lower()
    if value < 0:
        raise ValueError(f"a number of bytes cannot be negative, got {text!r}")
    return round(value * _SUFFIXES[suffix])


def parse_duration(text: str) -> float:
    """Read a time in seconds: ``"90s"``, ``"15m"``, ``"15 min"``, ``"1.5h"``, ``"1d"``.

    Raises:
        ValueError: the text is not a non-negative number with one of these suffixes.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|sec|m|min|h|d)\s*", text.lower())
    if match is None:
        raise ValueError(f"{text!r} is not a time; write it like 90s, 15m or 2h")
    return float(match.group(1)) * {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[match.group(2)]


def format_bytes(num_bytes: float) -> str:
    """Bytes for people, in binary units with three figures: ``format_bytes(3 * 1024**3) == "3.00 GiB"``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            digits = 0 if unit == "B" else max(0, 2 - len(str(int(abs(value)))) + 1)
            return f"{value:.{digits}f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_count(count: float) -> str:
    """A count for people: 134515008 is ``"134.5M"``, 950 is ``"950"``."""
    value = float(count)
    for suffix in ("", "k", "M", "B", "T"):
        if abs(value) < 1000 or suffix == "T":
            return f"{value:.0f}" if suffix == "" else f"{value:.1f}{suffix}"
        value /= 1000
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """Seconds for people: ``"42 s"``, ``"3 min 05 s"``, ``"2 h 10 min"``."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"
