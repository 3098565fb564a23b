"""Tasks of the lm-evaluation-harness (EleutherAI, github.com/EleutherAI/lm-evaluation-harness) on a model that is loaded already.

An optional package: ``pip install 'lowtide[eval]'``. Tasks whose data is on the Hugging Face hub need the network or a filled cache;
task files of one's own, over local data, do not.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_harness_tasks(tasks: Sequence[str], include: str | os.PathLike[str] | None = None) -> TaskManager:
    """See that there are these tasks, before a model is loaded. Their data is not looked at.

    Args:
        tasks: names the harness knows, or of task files in ``include``.
        include: a directory with task files (YAML) of one's own.

    Returns:
        What :func:`evaluate_with_harness` takes as ``manager``.

    Raises:
        ValueError: the package is not installed, or there is no such task or directory.
    """
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise ValueError(f"the lm-evaluation-harness is not installed ({error}): pip install 'lowtide[eval]'") from None
    if include is not None and not Path(include).is_dir():
        raise ValueError(f"{include} is no directory with task files")
    manager = lm_eval.tasks.TaskManager(include_path=None if include is None else os.fspath(include))
    for task in tasks:
        if task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"the lm-evaluation-harness has no task {task!r}{hint}; `lm-eval ls tasks` lists them")
    return manager


def evaluate_with_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    include: str | os.PathLike[str] | None = None,
    manager: TaskManager | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics by task.

    Args:
        model: a causal language model on its device; left in the mode it is in.
        tokenizer: its tokenizer.
        tasks: names the harness knows, or of task files in ``include``.
        batch_size: requests that go through the model at a time.
        limit: the first so many examples of each task; None for all.
        num_fewshot: solved examples in front of each; None for what the task says.
        apply_chat_template: write requests as the tokenizer's chat template has them.
        include: a directory with task files (YAML) of one's own.
        manager: what :func:`find_harness_tasks` has found for these tasks, if it has been asked; ``include`` is not needed then.

    Returns:
        For every task and group of tasks its metrics, named ``metric`` or ``metric,filter`` where the filter is not "none".

    Raises:
        ValueError: the package is not installed, or there is no such task.
        ConnectionError: the data of a task cannot be loaded.
    """
    manager = manager or find_harness_tasks(tasks, include)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    try:
        wrapped: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, apply_chat_template=apply_chat_template,
            task_manager=manager, log_samples=False, bootstrap_iters=0,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ConnectionError(f"the data of {', '.join(tasks)} cannot be loaded: {reason}") from error
    finally:
        model.train(was_training)
    assert found is not None
    results = {**found["results"], **found.get("groups", {})}
    return {name: _numbers(metrics) for name, metrics in results.items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Without names, standard errors and counts."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in name and "," in name
    }
