"""Reports: runs and results as tables, pictures and model cards; computes nothing."""
