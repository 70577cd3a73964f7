"""Serving side of retinaserve: pictures in, detections out. Knows nothing of torch."""
