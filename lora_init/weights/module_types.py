"""The names of the module types that can have an adapter."""

LINEAR_TYPES = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
CONVOLUTIONS = ("Conv2d",)
MODULE_TYPES = (*LINEAR_TYPES, *CONVOLUTIONS, "Embedding")
EXPERTS = "Experts"
"""Supported by each method that supports Linear, because an expert's weight is such a matrix."""
