"""A trained model in the forms that others use: names of its classes, model card, ONNX."""
