"""The floors of the house (docs/architecture.md): imports go down only, function-level imports included."""

import ast
from pathlib import Path

import lowtide

SOURCE = Path(lowtide.__file__).parent

# Floor of each top-level module or package. A module may import from lower floors and from its own entry; a few entries
# share a floor, and there `SAME_FLOOR` lists who may use whom (never both ways).
FLOORS = {
    "units": 0,
    "cache_folder": 0,
    "log": 0,
    "ranks": 0,
    "optim": 1,
    "fused": 2,
    "weights": 3,
    "planning": 3,
    "models": 4,
    "data": 4,
    "fusing": 4,
    "sharding": 4,
    "training": 5,
    "evaluation": 5,
    "reporting": 5,
    "integrations": 6,
    "cli": 6,
    "__init__": 6,
    "__main__": 6,
}
SAME_FLOOR = {
    ("sharding", "models"),  # the same
    ("fusing", "models"),  # finds the blocks and the head of a Hugging Face model
    ("planning", "weights"),  # counts the buffers that weights from elsewhere visit
    ("training", "evaluation"),  # the loop evaluates
    ("cli", "__init__"),
    ("__main__", "cli"),
}


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, top-level entry) of every import of lowtide in a file, at any depth; relative imports are resolved."""
    package = path.relative_to(SOURCE.parent).with_suffix("").parts
    package = package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "lowtide":
                entry = name[1] if len(name) > 1 else "__init__"
                found.append((node.lineno, entry if entry in FLOORS else "__init__"))
    return found


def violations(source: Path) -> list[str]:
    bad = []
    for path in sorted(source.rglob("*.py")):
        entry = path.relative_to(source).parts[0].removesuffix(".py")
        if entry not in FLOORS:
            bad.append(f"{path.name}: no floor is known for {entry!r}")
            continue
        for line, target in imports_of(path):
            below = FLOORS[target] < FLOORS[entry]
            if not (below or target == entry or (entry, target) in SAME_FLOOR):
                bad.append(f"{path.relative_to(source)}:{line} imports {target} (floor {FLOORS[target]})")
    return bad


def test_imports_go_down_only():
    assert violations(SOURCE) == []


def test_a_function_level_import_upwards_is_seen(tmp_path, monkeypatch):
    bad = tmp_path / "lowtide" / "optim" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("def f():\n    from ..fused import engine\n    from lowtide.training import trainer\n")
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path / "lowtide")
    assert len(violations(tmp_path / "lowtide")) == 2
