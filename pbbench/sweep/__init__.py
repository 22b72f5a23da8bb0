"""A grid of cells, each measured or trained in a process of its own, here or by a scheduler, once, whatever fails."""
