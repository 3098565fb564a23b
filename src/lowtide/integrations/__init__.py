"""lowtide inside of tools that people use already."""
