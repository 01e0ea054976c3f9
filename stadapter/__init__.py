"""Finding out what matters when a frozen image transformer is adapted to video (ST-Adapter, arXiv 2206.13559)."""

__version__ = "0.1.0"
