"""Probes on tensors: they know nothing of files, options or configurations."""
