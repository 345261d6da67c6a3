"""Groups as ONNX graphs: the formulas of `models` traced, with the numbers added."""
