"""Published claims about initializations, each measured again: the paper's figure beside ours.

    python -m experiments.papers                              the fast form of all, then the page
    python -m experiments.papers.pissa_quantization           one of them
    python -m experiments.papers.pissa_quantization --config-name full ranks=[8,64]

A reproduction is one module here, one folder `conf/papers/<name>/` and one line in `catalogue`:

- `smoke.yaml`, a form so small that a test runs it, of which no verdict is asked;
- `fast.yaml`, what two cores do in a few minutes, and the page shows;
- `full.yaml`, what the claim deserves, where time and hardware are there.

Its module states the claim, holds the measurement, and hands over `Findings`: claims with verdicts,
tables, figures, and the model and data they come from. What all of them share:

    verdicts     reproduced, same direction, not reproduced, contradicts
    findings     what a reproduction hands over
    paper        what a reproduction is: its claim, its settings, its function
    catalogue    all of them in order
    subjects     pretrained models and their linear layers
    corpora      texts, as batches of tokens
    tasks        a model with the task that its losses come from
    starts       what the registered methods start from: factors and gradients
    fine_tuning  short trainings, by the loop of the runs
    intervals    means and ratios with their intervals
    fitting      exponents with their intervals
    drawing      charts as Vega-Lite specifications and files
    tables       tables for a terminal, in Markdown and on the page
    results      a reproduction's folder: written last, taken again while nothing has changed
    summary      all claims in one table
    running      one reproduction as a Hydra application
    page         all of them as one page and one Markdown file

Arrows point down that list only.
"""
