"""The `trainbus` command: nothing that a user types or a file contains ends in a traceback."""
