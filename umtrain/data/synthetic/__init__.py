"""Synthetic slides and radiographs, written as the real files a scanner would write."""
