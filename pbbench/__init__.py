"""pbbench: what patch-wise diffusion costs and saves, in bytes, seconds and image quality.

Importing this package imports nothing heavy; each command imports what it needs when it runs.
"""

__version__ = "0.1.0"
