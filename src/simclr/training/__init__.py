"""Training: the loop, run folders, checkpoints, optimisers, devices, memory strategies, gradient caching."""
