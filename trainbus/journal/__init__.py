"""Records on disk: whatever ends a process, every whole record can be read back."""
