"""Quantizing: a trained run becomes a model in INT8 (or FP16, FP32) that later verbs read like a run."""
