"""`python -m analysis`, from a checkout: the same command as `stadapter report`."""

import sys

from stadapter.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
