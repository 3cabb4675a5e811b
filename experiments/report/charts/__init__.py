"""The drawings, by theme. Each module offers `charts(canvas, views)`: those it has data for.

Every drawing is one Altair definition without data: it names tables of `views`, and four
parameters that the page sets in all charts at once (methods, ranks, seeds, tasks) beside `rates`,
"best" or "all".
"""
