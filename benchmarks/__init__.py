"""Speed and memory, measured as ratios and rates within one run: `python -m benchmarks [name …]`."""
