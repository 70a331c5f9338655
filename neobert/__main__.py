"""``python -m neobert`` is the ``neobert`` command."""

import sys

from neobert.cli import main

if __name__ == "__main__":
    sys.exit(main())
