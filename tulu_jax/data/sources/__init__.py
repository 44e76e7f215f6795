"""Readers of raw files, and converters of each source's rows."""
