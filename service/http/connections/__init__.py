"""What every connection is held to, under both of the parsers of uvicorn."""
