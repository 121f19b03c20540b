"""Tasks: one module per command, called by the command line and by the Python API."""
