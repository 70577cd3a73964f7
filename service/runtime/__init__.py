"""A model file on a device: the artifact, sessions, devices, CPU concurrency, GPU engines."""
