"""Networks of other libraries: timm, torchvision and ONNX files."""
