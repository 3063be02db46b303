"""Files of MATLAB, version 5: bytes in, the arrays of one variable out. Needs scipy, an optional package.

Source: MathWorks, "MAT-File Format", https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf, as read by
`scipy.io.loadmat`. Files of version 7.3 are HDF5, and refused.
"""

import io
import os
import zlib
from collections.abc import Sequence

import numpy as np

from capsnet.errors import InputError

__all__ = ["variables"]

_DAMAGED = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError, zlib.error)
"""What scipy lets out on files cut short or changed; on those of version 7.3 it is NotImplementedError."""


def variables(content: bytes, path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The variables of the given `names` as MATLAB has them, none of its axes left out; `path` only names the file.

    Raises:
        InputError: scipy is not installed, `content` is no MATLAB file of version 5 or a damaged one, or has no
            variable of a name.
    """
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError:
        raise InputError(f"scipy must be installed to read {path}; it is not (pip install 'capsnet[mat]')") from None
    try:
        found = loadmat(io.BytesIO(content), variable_names=list(names), mat_dtype=False)
    except (*_DAMAGED, MatReadError, NotImplementedError) as error:
        raise InputError(f"{path} must be a whole MATLAB file of version 5; got another or a damaged one") from error
    for name in names:
        if not isinstance(found.get(name), np.ndarray):
            raise InputError(f"{path} must hold a variable {name}; got none of that name")
    return {name: found[name] for name in names}
