"""Labelled images: formats to samples, splits, problems, anchors that fit."""
