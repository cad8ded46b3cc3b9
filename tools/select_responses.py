"""simct-select-responses from a checkout, in which `pip install -e .` was run."""

import sys

from megatron_simct.commands.select_responses import main

if __name__ == "__main__":
    sys.exit(main())
