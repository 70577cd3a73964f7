"""From an admitted request to detections."""
