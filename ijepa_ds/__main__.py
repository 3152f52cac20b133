"""``python -m ijepa_ds COMMAND``: compare, demo, evaluate, export."""

import sys

from ijepa_ds.errors import UserError, run_command

COMMANDS = {
    "compare": ("ijepa_ds.evaluation.compare", "evaluations side by side, with the paper's numbers"),
    "demo": ("ijepa_ds.demo", "the whole job on built-in images: make, convert, pretrain, evaluate, export"),
    "evaluate": ("ijepa_ds.evaluation.probe", "probe a run's target encoder beside a random one"),
    "export": ("ijepa_ds.exchange", "write a run's target encoder for timm"),
}


def main() -> int:
    """Import and run one command; the others' imports cost nothing."""
    listing = "\n".join(f"  {name:<10}{help_line}" for name, (_, help_line) in COMMANDS.items())
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"python -m ijepa_ds COMMAND [options]\n{listing}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"'{name}' is not a command; choose one of: {', '.join(COMMANDS)}")
    module = __import__(COMMANDS[name][0], fromlist=["main"])
    return module.main(sys.argv[2:])


if __name__ == "__main__":
    run_command(main)
