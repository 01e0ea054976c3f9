"""The old name of `stadapter check`: it says what to type now, and does it."""

import runpy
import sys

if __name__ == "__main__":
    words = sys.argv[1:]
    print(f"note: `python -m stadapter.data` is now `stadapter {' '.join(words[:1])}`", file=sys.stderr)
    sys.argv = ["stadapter", *words]
    runpy.run_module("stadapter", run_name="__main__")  # by name: the package of commands stands above this one
