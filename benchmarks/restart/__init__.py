"""What merged weights can rescue: restarts after divergence, shocks and changes, each beside its controls.

`python -m benchmarks.restart --question optimizer` trains what is missing of a question; `--report` writes
`docs/what-merging-can-rescue.md` from the committed records.
"""
