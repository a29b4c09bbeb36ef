"""umtrain: train CNNs end to end on high-resolution medical images, in the memory there is.

Importing this package does no CUDA, torch or allocator work.
"""

__version__ = "0.1.0"
