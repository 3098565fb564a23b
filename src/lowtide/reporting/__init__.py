"""Reports about a run: plots."""

from .lr_plot import plot_lr_curve
from .plot import MemoryBar, plot_run, running_mean

__all__ = ["MemoryBar", "plot_lr_curve", "plot_run", "running_mean"]
