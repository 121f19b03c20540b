"""Exporters of encoders: torchvision and timm state dicts, ONNX files, preprocessing code."""
