"""`python -m fastjepa`, for an environment whose scripts are not on the path."""

import sys

from fastjepa.cli import main

if __name__ == "__main__":
    sys.exit(main())
