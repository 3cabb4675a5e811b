"""The report: folders of runs in, one page, its pictures and its tables out.

    runs           read a run's folder; say what is broken in it
    sweeps         which runs a sweep lists; name those that failed or are missing
    settings       which settings differ, and hence which runs may be averaged
    statistics     bootstrap over held-out examples and seeds
    palette        one fixed colour and shape per method
    summary        one row per method: score, interval, paired difference, cost
    frames         runs, layers and metrics as tables
    curves         losses, smoothed and thinned
    canvas         what all charts share
    charts         one definition per chart, for the page and for the files
    specification  a chart as JSON
    gallery        which charts a report has, with their words
    checks         what a reader must know first
    wording        what the page says in sentences
    tables         the rows for a terminal, in Markdown and in LaTeX
    page           the self-contained HTML page
    writing        everything into one folder

Arrows point down that list only.
"""
