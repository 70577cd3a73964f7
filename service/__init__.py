"""Serving side of retinaserve: images in, detections out. Knows nothing of torch."""

import os

# Since 1.29 onnxruntime reports host and models to its maker, beginning with its import, and keeps
# a device id in the home folder. This service sends nothing anywhere; an operator who wants the
# reports sets the variable to 0. It has to be set before any module here imports onnxruntime.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
