"""qlog: train reasoning language models on the Tsallis q-log loss family."""

__version__ = "0.1.0"
