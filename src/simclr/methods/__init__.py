"""Methods: modules that turn a batch into a loss and metrics; the loop in train.py trains any of them."""
