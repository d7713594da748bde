"""``python -m probae``, the command line, which ``torchrun -m probae`` starts several times."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
