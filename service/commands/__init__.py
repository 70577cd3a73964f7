"""The commands; `service.cli` has their options."""
