"""The command line: flags in, tasks called; imports no torch before the flags are known to be valid."""
