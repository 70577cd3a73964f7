"""The process and the machine: CPUs, memory, standard files."""
