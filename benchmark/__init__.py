"""What bench.py measures with: models to run, transformers on the same weights, clocks, and the machine's limits."""
