"""`python -m mindspeed_mm` and `torchrun ... -m mindspeed_mm`.

The guard matters: worker processes import this module.
"""

from mindspeed_mm.cli.main import entry

if __name__ == "__main__":
    entry()
