"""``python -m canter``, and so ``torchrun -m canter``."""

import sys

from canter.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
