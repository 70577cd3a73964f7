"""The same application on Ray Serve."""
