"""How a sweep stands: `python -m experiments.status SWEEP`, live with `--watch`.

Read from the files that the runs keep, so it may be asked at any moment, from any machine that sees
the folder, and it disturbs nothing:

- survey.py    the sweep's folder -> one `Line` a run: its state, how far it is, why it failed
- forecast.py  finished and running runs -> the time left
- page.py      both -> a table on the screen, or JSON
"""
