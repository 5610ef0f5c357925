"""Stands for NeMo, whose import takes ten seconds, and on a busy machine a minute: the server imports it first."""

import os
import time
from pathlib import Path

Path(os.environ["SERVER_FILE"]).write_text(str(os.getpid()))
time.sleep(60)
