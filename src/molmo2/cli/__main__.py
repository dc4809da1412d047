"""`python -m molmo2.cli`, the same as `molmo2`."""

import sys

from molmo2.cli import main

if __name__ == "__main__":
    sys.exit(main())
