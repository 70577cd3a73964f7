"""What an operator sees: metrics, log lines, traces."""

from service.observability.logs import JsonFormatter, TextFormatter, configure_logging
from service.observability.metrics import Metrics

__all__ = ["JsonFormatter", "Metrics", "TextFormatter", "configure_logging"]
