"""``python -m ijepa_ds COMMAND``, or on several processes ``deepspeed --module ijepa_ds COMMAND``."""

import sys

from ijepa_ds.errors import UserError, run_command

COMMANDS = {
    "checkpoints": ("ijepa_ds.run.checkpoints_command", "list a run's checkpoints, and whether they are whole"),
    "compare": ("ijepa_ds.evaluation.compare", "evaluations side by side, with the paper's numbers"),
    "demo": ("ijepa_ds.demo", "the whole job on built-in images: make, convert, pretrain, evaluate, export"),
    "evaluate": ("ijepa_ds.evaluation.command", "measure a run's target encoder beside a random one"),
    "plan": ("ijepa_ds.plan.command", "memory, time and cost of a run on GPUs that need not be there"),
    "masks": ("ijepa_ds.checks.mask_statistics", "what the mask samplers draw: statistics and a picture"),
    "replay": ("ijepa_ds.checks.replay", "replay a recorded run of another implementation and compare"),
    "export": ("ijepa_ds.exchange.export", "write a run's encoder for timm, transformers or the released code's tools"),
    "import": ("ijepa_ds.exchange.import_run", "make a run folder from a checkpoint in the released code's format"),
    "convert-config": ("ijepa_ds.exchange.reference_yaml", "write our configuration from a YAML of the released code"),
}


def main() -> int:
    """Import and run one command; the others' imports cost nothing."""
    listing = "\n".join(f"  {name:<16}{help_line}" for name, (_, help_line) in COMMANDS.items())
    # deepspeed --module ijepa_ds COMMAND: the launcher puts its own argument before the command.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(f"python -m ijepa_ds COMMAND [options]\n{listing}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"'{name}' is not a command; choose one of: {', '.join(COMMANDS)}")
    module = __import__(COMMANDS[name][0], fromlist=["main"])
    return module.main(arguments[1:])


if __name__ == "__main__":
    run_command(main)
