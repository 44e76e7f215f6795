"""Registers the tasks and mixtures of TÜLU."""
