"""The exhibits of the Focal Loss paper from this code and the user's data."""
