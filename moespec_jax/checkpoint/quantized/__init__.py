"""Quantized checkpoints: which stored tensors make up a weight, and the weight that they stand for."""
