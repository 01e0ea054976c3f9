"""`python -m stadapter`: the same command as `stadapter`."""

import sys

from stadapter.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
