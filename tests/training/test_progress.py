import io

from rich.console import Console

from lowtide.training import ConsoleProgress


def events(num_steps):
    yield {"event": "config", "step": 0, "time": 0.0, "num_steps": num_steps}
    yield {"event": "eval", "step": 0, "loss": 2.0, "perplexity": 7.39, "num_tokens": 100, "memory_bytes": 5}
    for step in range(1, num_steps + 1):
        yield {
            "event": "train",
            "step": step,
            "time": 10.0 + 2.0 * step,
            "loss": 3.0 / step,
            "lr": 1e-3,
            "grad_norm": 0.5 if step % 2 else None,
            "num_tokens": 128,
            "tokens_per_s": 64.0,
            "memory_bytes": 3 * 2**30,
            "skipped": False,
        }
    yield {"event": "end", "step": num_steps}


def shown(num_steps, width=160, **options):
    stream = io.StringIO()
    console = Console(file=stream, width=width, **options)
    with ConsoleProgress(console, log_every=2) as progress:
        for event in events(num_steps):
            progress(event)
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    lines = shown(5).splitlines()
    assert lines == [
        "step 0: held-out loss 2.0000, perplexity 7.39 (100 tokens)",
        "step 1/5  loss 3.0000  lr 1.00e-03  grad norm 0.5  64 tokens/s  3.00 GiB  8 s left",  # a sign of life
        "step 2/5  loss 1.5000  lr 1.00e-03  64 tokens/s  3.00 GiB  6 s left",
        "step 4/5  loss 0.7500  lr 1.00e-03  64 tokens/s  3.00 GiB  2 s left",
        "step 5/5  loss 0.6000  lr 1.00e-03  grad norm 0.5  64 tokens/s  3.00 GiB  0 s left",
    ]


def test_a_bar_on_a_terminal():
    text = shown(3, force_terminal=True)
    assert "3/3" in text
    assert "loss 1.0000" in text
    assert "held-out loss 2.0000" in text


def test_a_narrow_terminal_shows_everything_in_one_line():
    text = shown(1, width=80, force_terminal=True)
    assert "1/1 loss 3.000 lr 1.0e-03 norm 0.5 64 tok/s 3.00 GiB 0 s left" in text
    assert "…" not in text


def test_the_screen_is_given_back_after_an_error():
    progress = ConsoleProgress(Console(file=io.StringIO(), force_terminal=True))
    for event in list(events(3))[:3]:
        progress(event)
    live = progress._bar.live
    assert live.is_started
    progress.close()
    assert not live.is_started
