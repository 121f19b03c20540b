"""Encoders on disk: the encoder folder, loading by name or path, importers and exporters."""
