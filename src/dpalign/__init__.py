"""Directional Preference Alignment: one language model, steered with arithmetic."""

__version__ = "0.1.0"
