"""What the commands do; `service.cli` says how they are called."""
