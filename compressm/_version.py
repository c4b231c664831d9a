"""The version, which any room may know."""

__version__ = "0.1.0"
