"""The version of the package, for everything that prints or records it."""

__version__ = "0.1.0"
