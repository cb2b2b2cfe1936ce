"""Thin layers over transformers' and TRL's trainers."""
