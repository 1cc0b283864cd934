"""From runs to tables, figures and pages: `python -m qlog.report WORKDIR_OR_BUCKET...`

    folders --read--> Run --group--> Group (seeds) --tables, figures, page--> files

In reading order: `records` (Run, Group, Cell), `read` (what a folder holds), `groups` (which runs
differ only in their seed), `statistics`, `tables` (the paper's, cell by cell), `texts` (Markdown,
CSV, LaTeX), `figures`, `health` (verdicts), `page` (one HTML file), `comparison` (all of it).
"""
