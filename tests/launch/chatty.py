"""A library with handlers of its own, as they are when it has been imported."""

import logging
import logging.handlers
import sys

for handler in (
    logging.StreamHandler(sys.stdout),
    logging.handlers.MemoryHandler(1, target=logging.StreamHandler(sys.stderr)),
    logging.lastResort,
):
    logging.getLogger("library").addHandler(handler)
