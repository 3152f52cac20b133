"""Memory, time and cost of a run before it is started: ``python -m ijepa_ds plan``."""
