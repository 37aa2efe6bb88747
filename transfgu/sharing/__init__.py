"""Share a trained model with other programs: names of its classes, model card, ONNX, exported masks."""
