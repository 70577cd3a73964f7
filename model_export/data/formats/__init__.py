"""Pascal VOC, COCO and YOLO, read and written."""
