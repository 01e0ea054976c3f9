"""The blocks of commands in the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- tested -->\n)?```bash\n(.*?)```", re.DOTALL)
