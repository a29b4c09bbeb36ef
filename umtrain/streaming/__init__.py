"""Exact strip-by-strip training: a network's step in a fraction of its feature maps' memory.

README.md beside this file derives the method. `stream(model)` is the way in.
"""
