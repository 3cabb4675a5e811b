"""The typed configuration of a run, and what connects it to Hydra."""
