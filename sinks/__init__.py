"""Sinks: one file for each tracker, named after it."""
