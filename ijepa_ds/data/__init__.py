"""Images and masks for training and evaluation; all of FFCV is in ``beton`` and ``ffcv_pipeline``.

FFCV keeps two constants in a dictionary of numba's, which compiles for three seconds and more in every process that
imports it. No compiled code reads them, so a dictionary of Python's does as well.
"""

from unittest import mock

with mock.patch("numba.typed.Dict", dict):
    import ffcv.fields  # noqa: F401
