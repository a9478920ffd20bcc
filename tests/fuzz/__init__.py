"""Odd inputs for every file and flag that a user gives, in worker processes that may die: see run.py."""
