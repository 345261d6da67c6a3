"""Groups as ONNX graphs: the formulas of `models` are traced, then the weights are added."""
