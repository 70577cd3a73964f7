"""`serve run service.ray_app:app`: the name by which Ray Serve imports the application."""

from service.ray_serve.app import app, open_app

__all__ = ["app", "open_app"]
