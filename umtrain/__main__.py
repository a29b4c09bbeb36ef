"""`python -m umtrain` is `umtrain`."""

import sys

from umtrain.cli import main

sys.exit(main())
