"""Predictions, before anything runs: what a step takes of memory, traffic and time.

All that is said here is predicted, never measured.
"""
