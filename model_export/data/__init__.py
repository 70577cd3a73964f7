"""Labelled images: formats, samples, splits, problems, anchor fit, batches."""
