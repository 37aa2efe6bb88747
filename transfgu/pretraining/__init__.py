"""Self-supervised training of an encoder from images alone."""
