"""Makes `python -m trainbus` the same as `trainbus`."""

from trainbus.cli.app import main

if __name__ == "__main__":
    main()
