"""The names of the module types that can have an adapter."""

LINEAR_TYPES = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
MODULE_TYPES = (*LINEAR_TYPES, *CONVOLUTIONS, "Embedding")
