"""`python -m deferlib.cli`."""

import sys

from deferlib.cli import main

sys.exit(main())
