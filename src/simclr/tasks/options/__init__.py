"""Flags of the commands as dataclasses; imports no torch, so that `--help` answers at once."""
