"""The results as a table for people: GiB, and what was planned beside what was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

GIB = 1024**3


def one_line(row: Mapping[str, object]) -> str:
    """A row while the suite runs."""
    shown = [f"{row['part']}: {row['case']}: {row['status']}"]
    if row.get("step_s"):
        shown.append(f"{row['step_s']} s a step, {row.get('tokens_per_s', '')} tokens/s")
    if row.get("mfu"):
        shown.append(f"MFU {row['mfu']}")
    if row.get("allocated"):
        shown.append(
            f"device {gib(row['allocated'])} GiB in tensors, {gib(row.get('reserved'))} reserved, {gib(row.get('plan_device'))} planned"
        )
    if row.get("ratio"):
        shown.append(f"ratio {row['ratio']}")
    shown += [str(row[name]) for name in ("homes", "note") if row.get(name)]
    return "; ".join(shown)


def gib(value: object) -> str:
    """Bytes as GiB with two decimals; empty where nothing was measured."""
    return "" if value in (None, "") else f"{int(str(value)) / GIB:.2f}"


COLUMNS = (
    ("part", lambda row: row["part"]),
    ("case", lambda row: row["case"]),
    ("status", lambda row: row["status"]),
    ("step, s", lambda row: row["step_s"]),
    ("step planned, s", lambda row: row["plan_step_s"]),
    ("tokens/s", lambda row: row["tokens_per_s"]),
    ("MFU", lambda row: row["mfu"]),
    ("device: tensors", lambda row: gib(row["allocated"])),
    ("device: planned", lambda row: gib(row["plan_device"])),
    ("device: reserved", lambda row: gib(row["reserved"])),
    ("device: limit", lambda row: gib(row["cap"])),
    ("host: pinned", lambda row: gib(row["pinned"])),
    ("host: planned", lambda row: gib(row["plan_host"])),
    ("host: resident", lambda row: gib(row["resident"])),
    ("ratio", lambda row: row["ratio"]),
    ("note", lambda row: "; ".join(filter(None, (row["homes"], row["note"])))),
)


def markdown(rows: Iterable[Mapping[str, str]]) -> str:
    """A table for docs/gpu.md; memory in GiB."""
    lines = ["| " + " | ".join(name for name, _ in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(value(row)).replace("|", "/") for _, value in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def console(rows: Iterable[Mapping[str, str]]) -> None:
    """The same on the terminal, without the columns that are empty."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(title="memory in GiB", title_justify="left", show_lines=False)
    shown = [(name, value) for name, value in COLUMNS if any(value(row) for row in rows)]
    for name, _ in shown:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(str(value(row)) for _, value in shown))
    width = None if Console().is_terminal else 220
    Console(width=width).print(table)
