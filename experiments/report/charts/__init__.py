"""The drawings by theme. Each module has `charts(canvas, views)`, which returns those with data.

A drawing is an Altair definition without data. It names tables of `views` and the parameters that
the page sets in all charts: methods, ranks, seeds, tasks, and `rates` ("best" or "all").
"""
