"""Transformers with fewer layers, attention heads and MLP channels, trained to say the same."""
