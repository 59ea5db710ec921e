"""Data: layouts of image folders, the unified datamodule, checking, and synthetic products."""
