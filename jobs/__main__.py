"""`python -m jobs` is `ddpm`."""

import sys

from jobs.cli import main

sys.exit(main())
