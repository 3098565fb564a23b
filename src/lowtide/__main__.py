"""``python -m lowtide``: the same as the command ``lowtide``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
