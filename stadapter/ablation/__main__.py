"""The old name of the commands on sweeps. It prints the new one, and runs it."""

import runpy
import sys

if __name__ == "__main__":
    words = sys.argv[1:]
    print(f"note: `python -m stadapter.ablation` is now `stadapter {' '.join(words[:1])}`", file=sys.stderr)
    sys.argv = ["stadapter", *words]
    runpy.run_module("stadapter", run_name="__main__")  # by name: the package of commands stands above this one
