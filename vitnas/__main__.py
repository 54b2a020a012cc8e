"""`python -m vitnas`, which torchrun can start."""

import sys

from vitnas.cli import main

sys.exit(main())
