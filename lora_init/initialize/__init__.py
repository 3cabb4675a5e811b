"""Runs the initializers over the planned layers: on all cores, a GPU, or several processes."""
