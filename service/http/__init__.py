"""All that knows HTTP: the application, its server, its routes."""
