"""Adapters: one file or package for each framework, named after it."""
