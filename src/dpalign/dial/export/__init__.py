"""A policy as a plain Hugging Face folder."""
