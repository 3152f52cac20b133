"""What takes optimizer steps, and its checkpoints; all of DeepSpeed is imported here."""
