"""Engines that draw answers from a policy."""
