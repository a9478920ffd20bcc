"""How good is a cache? The parts of `evaluate.py`: caches to compare, tasks, what came of them, pictures."""
