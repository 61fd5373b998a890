"""``python -m unbackdoor``."""

import sys

from unbackdoor.cli import main

sys.exit(main())
