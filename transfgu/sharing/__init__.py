"""A trained model in the forms that others use: model card, ONNX."""
