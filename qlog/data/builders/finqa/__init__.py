"""One TFDS builder."""
