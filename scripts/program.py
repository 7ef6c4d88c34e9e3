"""What every program here begins with; it says so where the project is not installed for this Python."""

import sys

try:
    from envs.errors import FoundLate as FoundLate
    from envs.errors import UserError as UserError
    from envs.terminal import console as console
    from envs.terminal import run as run
    from envs.terminal import say as say
    from envs.terminal import was_interrupted as was_interrupted
except ModuleNotFoundError as e:
    sys.exit(
        f"error: {e.name} is not installed for {sys.executable}: run `make setup` once, then "
        "`source .venv/bin/activate`, or .venv/bin/python in place of python3"
    )
