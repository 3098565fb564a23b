"""The programs in docs/transformers.md run as they stand, one after the other, but for the name of the model."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "transformers.md"


def test_the_programs_in_the_documentation(model_dir, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    programs = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(programs) == 3
    monkeypatch.chdir(tmp_path)
    scope = {}
    for program in programs:
        assert "MODEL" in program or scope
        exec(compile(program.replace("MODEL", str(model_dir)), str(DOCS), "exec"), scope)
        if "trainer" in scope:
            losses = [entry["loss"] for entry in scope["trainer"].state.log_history if "loss" in entry]
            assert len(losses) == 3
    assert (tmp_path / "runs" / "trainer" / "checkpoint-2" / "lowtide_engine.json").is_file()
