"""simct-check-pair from a checkout, in which `pip install -e .` was run."""

import sys

from megatron_simct.commands.check_pair import main

if __name__ == "__main__":
    sys.exit(main())
