"""Delivers records to sinks: each sink receives every record, in order, or the loss is counted."""
