"""Pretrain: ``deepspeed run.py --config ds_configs/vith14.json [--set KEY=JSON ...]``."""

from ijepa_ds.errors import run_command
from ijepa_ds.run.launchers import watch_launchers

if __name__ == "__main__":
    watch_launchers()  # who starts this may be gone after the seconds that the rest takes
    from ijepa_ds.train import main

    run_command(main)
