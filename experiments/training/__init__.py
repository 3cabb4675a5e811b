"""The training loop: batches in, a trained adapter and its progress out."""
