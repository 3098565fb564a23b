"""What people see while data is loaded: first that it is hashed, then that it is read."""

import io

from rich.console import Console

from lowtide.data.loading import LoadProgress
from lowtide.training.data_progress import DataProgress

GIB = 2**30


def shown(reports, *, terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200)
    with DataProgress(None, console) as progress:
        for report in reports:
            progress(report)
            if progress._bar is not None:
                progress._bar.refresh()
    return file.getvalue()


REPORTS = [
    LoadProgress(GIB // 2, 100 * GIB, 0, 0.5, hashing=True),  # too early to say anything
    LoadProgress(40 * GIB, 100 * GIB, 0, 40.0, hashing=True),
    LoadProgress(100 * GIB, 100 * GIB, 0, 100.0, hashing=True),
    LoadProgress(1 * GIB, 100 * GIB, 250_000, 200.0),
    LoadProgress(100 * GIB, 100 * GIB, 25_000_000, 10_000.0, done=True),
]


def test_lines_say_that_it_is_hashed_before_it_is_read():
    assert shown(REPORTS, terminal=False).splitlines() == [
        "data: hashing 40.0 GiB of 100 GiB, 1.00 GiB/s",
        "data: hashing 100 GiB of 100 GiB, 1.00 GiB/s",
        "data: 1.00 GiB of 100 GiB, 5.12 MiB/s, 250,000 tokens",
        "data: 25,000,000 tokens in 10000.0 s, 10.2 MiB/s",
    ]


def test_a_bar_for_each_on_a_terminal():
    text = shown(REPORTS, terminal=True)
    assert 0 < text.index("hashing the data") < text.rindex("hashing the data") < text.index("reading the data")
    assert "40.0 GiB of 100 GiB, 1.00 GiB/s" in text
    assert text.endswith("data: 25,000,000 tokens in 10000.0 s, 10.2 MiB/s\n")
