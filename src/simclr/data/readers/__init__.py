"""Readers of image data: folders, idx, npz, named sets of torchvision and scikit-learn, and their decoders."""
