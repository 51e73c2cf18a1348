"""``python -m openrlhf_sgpo.doctor``: works where ``openrlhf-sgpo`` itself cannot start."""

import sys

from openrlhf_sgpo.doctor.report import main

sys.exit(main(sys.argv[1:]))
