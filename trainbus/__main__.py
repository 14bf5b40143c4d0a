"""Makes `python -m trainbus` the same as `trainbus`."""

from trainbus.cli import main

if __name__ == "__main__":
    main()
