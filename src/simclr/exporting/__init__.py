"""`simclr export`: an encoder as a folder, a torchvision or timm state dict, an ONNX file, a folder for the hub."""
