"""Set up a process that serves: memory, log, warnings."""

from __future__ import annotations

import logging
import os
import warnings

from service.observability.logs import configure_logging
from service.settings import Settings, service_links, unknown_variables
from service.system.memory import keep_freed_memory

_log = logging.getLogger("retinaserve")


def prepare_process(settings: Settings) -> None:
    """Memory, log and warnings. Not for an application that somebody else embeds."""
    keep_freed_memory()
    configure_logging(settings.log_format, settings.log_level)
    # Pillow words its warnings after each odd image. Python would write every new wording past
    # the log, and remember it for ever.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for name in unknown_variables(os.environ):
        # A misspelt rate limit must not pass for one that is set.
        _log.warning("%s is not a setting of this version and is ignored", name)
    if links := service_links(os.environ):
        _log.warning(
            "%s: the address of a Kubernetes service is no setting and is ignored; "
            "enableServiceLinks: false in the pod's spec leaves it out",
            ", ".join(links),
        )
