"""The paper's Figures 4 and 5 on small models, and what a window costs that is too long or too short.

    python -m benchmarks.ablations             trains what is missing in benchmarks/ablations/records/
    python -m benchmarks.ablations --report    the tables, figures and the page's numbers from what is there

`setups` says what is trained and where it is measured, `merges` which merges, `training` how, `records` how results are
kept; `rules` compares rules with the best of all spans, `claims` the paper's sentences with the records, and `picture`
draws. Reading needs neither torch nor Lightning.
"""
