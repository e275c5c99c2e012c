"""Quantized layers, and how their integers are kept on disk."""
