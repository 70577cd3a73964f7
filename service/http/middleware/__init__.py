"""What lies around every route."""
