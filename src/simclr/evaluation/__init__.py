"""Evaluation protocols, one a file: on arrays of features, or on images and an encoder."""
