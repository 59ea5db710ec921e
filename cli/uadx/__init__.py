"""The command line of uadx."""

__version__ = "0.1.0"
