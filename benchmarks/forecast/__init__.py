"""How wrong forecasts of annealed losses are, on real anneals that they were not fitted to.

    python -m benchmarks.forecast [--json FILE] [--figure FILE] [--fresh] [--calibrate] [--only RUN ...]

`cases` pairs every anneal of `benchmarks/annealing` with what was known of its run when it was asked for, `tissue` is
the published law, `splits` says what is predicted from what, `scores` makes rows of it, `picture` draws it. Errors,
widths and coverages in the rows are fractions (0.002 is 0.2%); the printed tables show percent.
"""
