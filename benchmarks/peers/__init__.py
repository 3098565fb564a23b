"""lowtide beside what a user would pick instead, on a CPU; ``benchmarks/cpu_peers.py`` is the command."""
