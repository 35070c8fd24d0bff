"""``python -m attnlab`` is ``attnlab``."""

import sys

from attnlab.main import main

sys.exit(main())
