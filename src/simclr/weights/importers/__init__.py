"""Importers of checkpoints of other codebases: TensorFlow (google-research/simclr) and PyTorch files."""
