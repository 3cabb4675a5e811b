"""The training loop: batches in, a trained adapter out."""
