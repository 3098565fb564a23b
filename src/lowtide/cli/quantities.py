"""Flags with numbers: what their text stands for, and an error that says what was expected."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..units import parse_bytes


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``least`` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return value

    return parse


def positive(expected: str, *, zero: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers above 0, or from 0 on."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not (0 < value < float("inf") or (zero and value == 0)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def size(text: str) -> int:
    """Bytes: "24GiB"."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def rate(text: str) -> float:
    """Bytes a second: "12GB/s"."""
    try:
        value = parse_bytes(text.removesuffix("/s"))
    except ValueError:
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate; write it like 12GB/s")
    return float(value)


def flops(text: str) -> float:
    """Operations a second: "35T"."""
    number = text.upper().removesuffix("/S").removesuffix("FLOP")
    factor = {"G": 1e9, "T": 1e12}.get(number[-1:], 1.0)
    parse = positive("operations a second, as 35T or 80G")
    return factor * parse(number[:-1] if factor > 1 else number)
