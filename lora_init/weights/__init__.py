"""Weight formats: how each type of module stores its weight, and where weights are read from."""
