"""`python -m capsnet` is the command `capsnet`."""

import sys

from capsnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
