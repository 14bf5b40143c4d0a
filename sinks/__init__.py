"""Sinks: one file or package for each tracker, named after it."""
