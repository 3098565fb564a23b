"""Every block of Python in ``docs/from-lomo-optim.md`` runs, one after the other."""

import re
from pathlib import Path

from helpers import Snapshot, same_weights, tiny_batch, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "from-lomo-optim.md"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_migration_page_runs_from_top_to_bottom(capsys):
    model = tiny_model()
    names = {"model": model, "batches": [tiny_batch(0), tiny_batch(1)]}
    blocks = python_blocks(PAGE)
    assert len(blocks) == 6
    for number, block in enumerate(blocks):
        before = Snapshot(model)
        exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), names)
        if "backward" in block:
            assert not same_weights(before, model), block
    assert float(capsys.readouterr().out) > 0  # engine.grad_norm


def test_the_page_of_the_public_package_runs_with_another_import():
    """A loop as users of lomo-optim have it, with the import replaced in its text."""
    script = (
        "from lomo_optim import AdaLomo\n"
        "optimizer = AdaLomo(model, lr=1e-2, clip_grad_norm=1.0)\n"
        "for batch in batches:\n"
        "    loss = model(**batch).loss\n"
        "    optimizer.grad_norm(loss)\n"
        "    loss = model(**batch).loss\n"
        "    optimizer.fused_backward(loss, 1e-2)\n"
        "    losses.append(loss.item())\n"
    )
    names = {"model": tiny_model(), "batches": [tiny_batch(0)] * 8, "losses": []}
    exec(script.replace("from lomo_optim", "from lowtide.integrations.lomo_optim"), names)
    assert names["losses"][-1] < names["losses"][0] - 0.01


def test_the_door_is_not_opened_by_importing_lowtide():
    import subprocess
    import sys

    code = "import sys, lowtide, lowtide.cli; sys.exit(any('integrations' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
