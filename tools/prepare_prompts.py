"""simct-prepare-prompts from a checkout, in which `pip install -e .` was run."""

import sys

from megatron_simct.commands.prepare_prompts import main

if __name__ == "__main__":
    sys.exit(main())
