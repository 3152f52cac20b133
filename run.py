"""Pretrain: ``deepspeed run.py --config ds_configs/vith14.json [--set KEY=JSON ...]``."""

import os

from ijepa_ds.errors import run_command
from ijepa_ds.run.launchers import watch_launchers

if __name__ == "__main__":
    watch_launchers()  # who starts this may be gone after the seconds that the rest takes
    # Where rank 0 dies, its store is missed with a stack of C++; the heartbeat has a line for it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ijepa_ds.train import main

    run_command(main)
