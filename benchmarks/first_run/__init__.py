"""What a new user sees who puts the README's lines into a script: is the merged model better than the raw one?

    python -m benchmarks.first_run            trains what is missing in benchmarks/first_run/runs.jsonl, then the table

`script` is such a script, `runs` what is trained and kept.
"""
