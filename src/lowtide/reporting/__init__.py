"""Reports about a run: plots."""

from .plot import MemoryBar, plot_run, running_mean

__all__ = ["MemoryBar", "plot_run", "running_mean"]
