"""From a checkpoint to a verified model file."""
