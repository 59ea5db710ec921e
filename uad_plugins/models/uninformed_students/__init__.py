"""Uninformed Students (Bergmann et al., CVPR 2020, arXiv 1911.02357)."""
