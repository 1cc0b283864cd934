"""Whole programs that use the losses and nothing else of qlog."""
