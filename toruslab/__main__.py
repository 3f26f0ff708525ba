"""`python -m toruslab COMMAND`: the same as the command `toruslab`."""

import sys

from toruslab.benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
