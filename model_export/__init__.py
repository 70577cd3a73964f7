"""Labelled images in, one self-describing model file out: data, training, evaluation, export."""

import logging

# Where no home directory can be written it says so at import; there is nothing to do about it.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
