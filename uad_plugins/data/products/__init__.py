"""Synthetic products: small procedural data sets with realistic defects and exact masks."""
