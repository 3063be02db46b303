"""Files of MATLAB, version 5: bytes in, the arrays of one variable out.

Source: MathWorks, "MAT-File Format", https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf, as read by
`scipy.io.loadmat`. Files of version 7.3 are HDF5, and refused.
"""

import io
import os
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from capsnet.errors import InputError

__all__ = ["variables"]

_LARGEST = 2**31  # bytes: MATLAB keeps a variable of version 5 below this, and every data set read here is smaller
_HEADER, _COMPRESSED = 128, 15
_DAMAGED = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError, zlib.error)
"""What scipy lets out on files cut short or changed; on those of version 7.3 it is NotImplementedError."""


def variables(content: bytes, path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The variables of the given `names` as MATLAB has them, none of its axes left out; `path` only names the file.

    Raises:
        InputError: `content` is no MATLAB file of version 5 or a damaged one, or has no variable of a name.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        whole = _inflated(content, path)
        found = loadmat(io.BytesIO(whole), variable_names=list(names), mat_dtype=False)
    except InputError:
        raise
    except (*_DAMAGED, MatReadError, NotImplementedError) as error:
        raise InputError(f"{path} must be a whole MATLAB file of version 5; got another or a damaged one") from error
    for name in names:
        if not isinstance(found.get(name), np.ndarray):
            raise InputError(f"{path} must hold a variable {name}; got none of that name")
    return {name: found[name] for name in names}


def _inflated(content: bytes, path: str | os.PathLike[str]) -> bytes:
    """The same file with its variables unpacked, for scipy unpacks any amount; of another format, as it is.

    A file of version 5 is a header and then elements: their type and size in bytes, of 32 bits each, and their data;
    that of a compressed one is another element, packed by zlib.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[126:_HEADER])
    if order is None:
        return content
    parts, at, left = [content[:_HEADER]], _HEADER, _LARGEST
    while at + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, at)
        element = content[at : at + 8 + size]
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            element = unpacker.decompress(element[8:], left + 1)
            if len(element) <= left and not unpacker.eof:
                raise EOFError("a variable is cut short")
        left -= len(element)
        if left < 0:
            raise InputError(f"{path} must hold at most {_LARGEST:,} bytes unpacked; got more")
        parts.append(element)
        at += 8 + size
    return b"".join(parts)
