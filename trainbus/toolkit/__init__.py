"""For authors of adapters and sinks: hooks that can be undone, values, pictures and names."""
