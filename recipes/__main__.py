"""``python -m recipes OVERRIDES`` is ``nemo-pre train OVERRIDES``, for launchers that want a module."""

import sys

from nemo_pre.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
