"""Speed, memory and overhead, each one command: `python -m benchmarks.<name> [--json FILE]`."""
