"""Parts that end in every way there is; in a module of their own because other processes import them."""

import os
import signal
import time

import torch


def well(context):
    context.row("first", step_s="1.0", allocated=2**30)
    context.row("first", step_s="2.0", allocated=2**30)
    context.row("second")


def raising(context):
    context.row("before")
    raise ValueError("something\nis wrong")


def out_of_device_memory(context):
    context.row("before")
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def no_plan(context):
    raise MemoryError("no plan fits")


def killed(context):
    context.row("before")
    os.kill(os.getpid(), signal.SIGKILL)


def leaving(context):
    os._exit(3)


def too_slow(context):
    context.row("before")
    time.sleep(600)


def a_check_that_fails(context):
    context.row("holds")
    context.row("does not", status="FAILED")


def once_broken(context):
    """Fails until a file is there."""
    if not (context.output / "repaired").exists():
        raise RuntimeError("not repaired yet")
    context.row("now")
