"""The two axes of a KV cache: `layers` (how many slots a layer gets) and `tokens` (which tokens it keeps in them)."""
