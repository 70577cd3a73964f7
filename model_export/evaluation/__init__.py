"""COCO metrics of a model file, thresholds, calibration, error analysis, reports."""
