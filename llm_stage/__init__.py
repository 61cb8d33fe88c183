"""Multimodal models on top of a frozen encoder: data, labels, training, generation, benchmarks."""
