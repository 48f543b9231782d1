"""Exports a trained network to ONNX and TensorRT, certifies that the export gives the same outputs, and runs it."""
