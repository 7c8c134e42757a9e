"""``python -m stepfusion``: the command line."""

import sys

from stepfusion.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
