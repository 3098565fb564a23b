"""The parts of the GPU suite. Each is a generator of nothing that reports rows through its :class:`Context`; see ``run.py``."""
