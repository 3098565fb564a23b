"""What each method can do besides a step; not measured, but read. ``page.py`` prints it."""

READ = "source of the installed version"
# (method, clips by the exact norm of all gradients, accumulates gradients over micro-batches, resumes its state, runs on a CPU, how this was checked)
ABILITIES = (
    (
        "lowtide Lomo, AdaLomo, PerParameter",
        "yes, two passes over the graph",
        "yes, inside of a block; one backward a step",
        "yes",
        "yes",
        "own tests",
    ),
    ("torch AdamW, Adafactor, SGD", "yes, `clip_grad_norm_`", "yes", "yes, `state_dict`", "yes", "ordinary optimizers"),
    ("HF Trainer", "yes, `max_grad_norm`", "yes", "yes, checkpoints", "yes, `use_cpu`", READ),
    (
        "optimizer in backward (PyTorch's tutorial)",
        "no: gradients are gone before their norm is known",
        "no: every backward updates",
        "by hand: one `state_dict` a parameter",
        "yes",
        "the loop that is run here",
    ),
    (
        "lomo-optim Lomo",
        "yes, two passes, `grad_norm` first",
        "no: every backward updates",
        "it has none, but the loss scale of float16, which is not saved",
        "yes",
        READ,
    ),
    (
        "lomo-optim AdaLomo",
        "yes, two passes, `grad_norm` first",
        "no: every backward updates",
        "no: moments are not in `state_dict`",
        "no: `.cuda()` in its constructor",
        READ,
    ),
    ("pytorch-optimizer LOMO", "yes, two passes, `grad_norm` first", "no: every backward updates", "it has none, but the loss scale of float16: not checked", "yes", READ),
    ("pytorch-optimizer AdaLOMO", "yes, two passes, `grad_norm` first", "no: every backward updates", "yes, `state_dict`", "yes", READ),
    ("bitsandbytes AdamW8bit", "yes, `clip_grad_norm_`", "yes", "yes, `state_dict`", "yes, in this version", READ),
    (
        "BAdam",
        "of the active block's gradients only",
        "yes, of the active block",
        "in part: moments of the active block, not which block it is",
        "yes",
        READ,
    ),
    (
        "GaLore AdamW, layerwise",
        "no: gradients are gone before their norm is known",
        "no (transformers' Trainer refuses it)",
        "not checked",
        "yes; the 8-bit one no: `torch.cuda.synchronize` in its step",
        READ,
    ),
    ("LoRA (peft), AdamW", "yes, `clip_grad_norm_`", "yes", "yes, `state_dict`", "yes", "an ordinary optimizer on adapters"),
)  # fmt: skip


def table() -> str:
    """In Markdown."""
    head = (
        "method",
        "clipping by the exact global norm",
        "gradient accumulation",
        "resume of state",
        "CPU",
        "checked in",
    )
    lines = [head, ("---",) * len(head), *ABILITIES]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
