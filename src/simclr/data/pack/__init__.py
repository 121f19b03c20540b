"""Packs: decoded images in memory-mapped files, checksummed and shared between processes."""
