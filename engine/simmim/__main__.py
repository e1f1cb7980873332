"""`python -m simmim`, which torchrun starts."""

import sys

from simmim.cli import main

sys.exit(main())
