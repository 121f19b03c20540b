"""Methods: modules that turn a batch into a loss and metrics; training/loop.py trains any of them."""
