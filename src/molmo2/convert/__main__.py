"""`python -m molmo2.convert`."""

import sys

from molmo2.convert.cli import main

if __name__ == "__main__":
    sys.exit(main())
