"""`python -m shoal`: the command `shoal` from a tree that is not installed."""

import sys

from shoal.driver.cli import main

if __name__ == "__main__":
    sys.exit(main())
