"""The `trainbus` command: one module for each subject, imported when its command is used."""
