"""The commands of `model_export.cli`, one module each."""
