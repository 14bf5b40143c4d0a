"""Captures what a run is besides events; a failure costs what it would have captured, no more."""
