"""The method of I-JEPA (arXiv 2301.08243): plain keyword arguments, never a configuration, DeepSpeed or FFCV."""
