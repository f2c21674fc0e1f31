"""``python -m r2vpo`` is the command ``r2vpo``."""

import sys

from r2vpo.cli import main

sys.exit(main())
