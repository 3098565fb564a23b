"""Doors from other software into lowtide: one module each, imported by name only."""
