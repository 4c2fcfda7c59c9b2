"""The command `shoal` with stub ranks: python tests/stub/stub_cli.py run-batch ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import stub_ranks

from shoal.driver.cli import main

if __name__ == "__main__":
    stub_ranks.install()
    sys.exit(main())
