"""`python -m streamswav`."""

import sys

from streamswav.cli import enter

if __name__ == "__main__":
    sys.exit(enter())
