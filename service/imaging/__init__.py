"""Bytes to canvas: decoding, EXIF, resizing, letterbox geometry, limits and memory."""
