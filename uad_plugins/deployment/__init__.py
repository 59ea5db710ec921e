"""Bundles: what was trained or quantized, packaged to run on machines without torch."""
