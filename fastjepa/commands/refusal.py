"""How commands refuse: one line that says what to do."""

import argparse
import sys


def refuse(reason: object) -> int:
    """Say it on stderr; the exit status."""
    print(f"error: {reason}", file=sys.stderr)
    return 1


def count(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
