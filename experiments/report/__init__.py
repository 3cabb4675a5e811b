"""The report: reads folders of runs and writes one page with its pictures and tables.

Imports go down this list only:

    decisions      `docs/which-start.md`; situations: its cases; published: a page read back
    __main__       the command
    mirror         the report in wandb
    output         everything into one folder
    page           the HTML page
    contents       everything that a report shows
    gallery        which charts a report has; charts/ has the drawings
    specification  a chart as JSON, SVG, PDF and PNG
    canvas         what all charts share
    views          the tables that the charts are drawn from; spectra; fronts
    headline       three sentences: what differs, what does not, what could not be seen
    caveats        what the intervals cover
    result_table   the results; matrix_table: the verdicts; power_table: what more seeds resolve
    table          a table for a terminal, in Markdown and in LaTeX
    power          what a sweep resolves, and what more seeds and examples would
    matrix         every quantity of every arm compared with the baseline
    checks         warnings
    comparison     two sweeps with two versions of the code; peft_results: PEFT's own comparison
    summary        one row per arm with all measures
    judgement      a verdict on one quantity; pooled: the differences; quantities; statistics
    choices        the setting at which each arm is compared; arms: what is averaged
    archive        all runs as tables in Parquet; frames: a run as rows
    sweeps         the runs of a sweep; runs: one run; validation: what its files may contain
    facts, cells   values as text; palette: one color and shape per method
"""
