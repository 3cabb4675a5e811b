"""Run the command as `python -m lora_init.cli`."""

import sys

from lora_init.cli.parser import main

sys.exit(main())
