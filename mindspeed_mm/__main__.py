"""`python -m mindspeed_mm` and `torchrun ... -m mindspeed_mm`.

The guard matters: worker processes import this module.
"""

import sys

from mindspeed_mm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
