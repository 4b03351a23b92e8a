import sys

from asyppo_megatron.cli import main

sys.exit(main())
