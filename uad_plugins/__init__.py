"""The uadx library: unified visual anomaly detection for edge devices, built from plugins.

Importing this package is cheap: torch, anomalib and Lightning are imported by the modules that need them.
"""
