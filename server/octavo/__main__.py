"""``python -m octavo``: the command line where its script is not installed."""

import sys

from octavo.cli import main

sys.exit(main())
