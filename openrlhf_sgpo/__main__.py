"""``python -m openrlhf_sgpo``: the command ``openrlhf-sgpo``, even if its folder is not on the PATH."""

import sys

from openrlhf_sgpo.cli.main import main

sys.exit(main())
