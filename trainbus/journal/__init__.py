"""Stores records on disk: every complete record can be read back, however the process ended."""
