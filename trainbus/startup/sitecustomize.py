"""Python imports this file when it starts, as `trainbus run` puts its folder on the path.

The file of the same name that it hides, if there is one, is run afterwards.
"""

import os
import sys


def _start() -> None:
    config = os.environ.get("TRAINBUS_CONFIG")
    if config:
        try:
            from trainbus.auto import install
        except ImportError:
            print(
                f"trainbus: {sys.executable} has no trainbus; what it trains is not logged",
                file=sys.stderr,
            )
            return
        install(config)


def _run_the_hidden_one() -> None:
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    path = [entry for entry in sys.path if os.path.abspath(entry) != here]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_start()
_run_the_hidden_one()
