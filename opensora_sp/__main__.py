"""`python -m opensora_sp COMMAND [flags]` is `opensora-sp COMMAND [flags]`."""

import sys

from opensora_sp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
