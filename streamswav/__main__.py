"""`python -m streamswav`."""

import sys

from streamswav.cli import main

if __name__ == "__main__":
    sys.exit(main())
