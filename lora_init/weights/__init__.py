"""Weight formats: how each kind of module stores its weight, and where the weight is read from."""
