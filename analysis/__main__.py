"""`python -m analysis`: the report, from a checkout. `stadapter report` is the same command, wherever it is
installed."""

import sys

from stadapter.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
