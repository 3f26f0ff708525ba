"""toruslab: how to partition a transformer decoder over a 3D torus of chips."""

__version__ = "0.2.0"
