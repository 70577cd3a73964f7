"""What the commands of `model_export.cli` do, one module each."""
