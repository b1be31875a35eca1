"""Evaluation: benchmarks, efficiency against context length, the report, and the demo that walks
through all of it.

Run from the checkout: `python -m eval scenes | tasks | efficiency | report | demo --help`.
"""
