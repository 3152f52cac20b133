"""Images and masks for training and evaluation; all of FFCV is in ``beton`` and ``ffcv_pipeline``."""

from ijepa_ds.data import beton  # noqa: F401  # whichever file is imported first: see there how it imports ffcv
