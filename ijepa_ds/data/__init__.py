"""Images and masks for training and evaluation; all of FFCV is in ``beton`` and ``ffcv_pipeline``."""
