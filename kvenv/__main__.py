"""``python -m kvenv`` is the ``kvenv`` command."""

import sys

from kvenv.cli import main

if __name__ == "__main__":
    sys.exit(main())
