"""Published claims about initializations, measured again and compared with the papers' figures.

    python -m experiments.papers                              the fast form of all, then the page
    python -m experiments.papers.rank_scaling                 one of them
    python -m experiments.papers.rank_scaling --config-name full ranks=[8,64,512]

A reproduction is a module `<name>` here (a long one has `<name>_rows` and others), one folder
`conf/papers/<name>/`, one line in `catalogue` and one test. Its three forms are `smoke.yaml` (tiny,
for tests, without meaningful verdicts), `fast.yaml` (minutes on two cores, shown on the page) and
`full.yaml` (with more time and hardware).

The module has an options dataclass and four functions, and passes them to `Reproduction`:

    measure     load models and measure: rows as data frames, and facts about the setup
    judge       rows -> claims with verdicts
    tabulate    rows -> tables
    draw        rows -> charts, most of them by `drawing.plot`

The skeleton does the rest: the command line, resuming, files, and the page. Imports go down this
list and never up:

    page, __main__    all results on one page; the command that runs all of them
    application       the command line of one reproduction
    result            its folder of files
    paired_comparison, classifier_training    starts compared by short trainings of a classifier
    text, drawing     tables and claims as text; what charts share
    reproduction      the skeleton: Options, Reproduction, Measurement, Table, Figure
    claim             verdicts
    interval          means, ratios and exponents with intervals
    starts            what registered methods start from: factors and gradients
    language, fine_tuning, tasks, corpus, subject    losses, short trainings, data and models
"""
