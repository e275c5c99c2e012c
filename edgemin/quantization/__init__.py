"""Quantization: layers of integers, their scales and ranges, and one file per method."""
