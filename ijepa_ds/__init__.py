"""I-JEPA pretraining on DeepSpeed and FFCV."""

__version__ = "0.1.0"
