"""Labelled images in, one self-describing model file out: data, training, evaluation, export."""
