"""Runs the `trainbus` command as `python -m trainbus`."""

from trainbus.cli.app import main

if __name__ == "__main__":
    main()
