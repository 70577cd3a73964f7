"""The name by which Ray Serve's proxies import what lies around them."""

from service.ray_serve.proxy import layers

__all__ = ["layers"]
