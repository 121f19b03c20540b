"""Settings as frozen dataclasses, recipes, the learning-rate schedule and JSON records; imports no torch."""
