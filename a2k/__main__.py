import sys

from a2k.cli import main

sys.exit(main())
