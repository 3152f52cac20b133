"""Pretrain: ``deepspeed run.py --config ds_configs/vith14.json [--set KEY=JSON ...]``."""

from ijepa_ds.errors import run_command
from ijepa_ds.train import main

if __name__ == "__main__":
    run_command(main)
