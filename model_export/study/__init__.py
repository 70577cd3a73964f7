"""The exhibits of the paper, drawn from this code and from the user's data."""
