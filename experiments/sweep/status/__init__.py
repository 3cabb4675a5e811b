"""The state of a sweep: `python -m experiments.status SWEEP`, live with `--watch`.

It only reads the files that the runs keep, so it can run at any time, on any machine that sees the
folder.
"""
