"""Adapters: one file for each framework, named after it."""
