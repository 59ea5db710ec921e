"""Measuring: per-category metrics, thresholds, overlays and reports."""
