"""The report: folders of runs in, one page, its pictures and its tables out.

    runs           read a run's folder; say what is broken in it
    frames         a run as rows of three tables
    sweeps         which runs a sweep lists; what its protocol selected
    gathering      all runs as tables, kept as Parquet; only what is new is read
    settings       which settings differ, and hence what is compared and what is averaged
    statistics     bootstrap over held-out examples and seeds; intervals over seeds alone
    selection      the setting that each method is judged at
    palette        one fixed colour and shape per method
    summary        one row per method: score, interval, paired difference, cost
    curves         losses, gradients and updates, smoothed and thinned
    spectra        the spectra of the chosen runs
    views          the few tables that charts and page draw from
    canvas         what all charts share
    charts/        the drawings by theme, one definition each, for the page and for the files
    specification  a chart as JSON
    gallery        which charts a report has
    pictures       a chart as SVG, PDF and PNG
    comparison     two sweeps over code versions, setting by setting
    peft_results   PEFT's own comparison, as rows to read beside ours
    checks         what a reader must know first
    wording        what the page says in sentences
    divergence     settings at which runs diverged
    facts          model, data, budget and machine in words
    tables         the rows for a terminal, in Markdown and in LaTeX
    beside         the comparison and PEFT's rows as text
    page           the self-contained HTML page
    writing        everything into one folder
    mirroring      the same in wandb

Arrows point down that list only.
"""
