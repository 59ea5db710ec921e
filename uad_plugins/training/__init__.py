"""Training: one model on many categories, resumable at any moment."""
