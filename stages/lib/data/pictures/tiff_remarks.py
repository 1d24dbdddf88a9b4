"""What libtiff says of a file it cannot read: it writes that to standard error, without the file's name."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator

from PIL import _imaging

from stages.lib.data.pictures.formats import UnusableImageError

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_MOST_BYTES = 512
# Of pixels that are lost, after which libtiff goes on; tags that it does not know are no loss.
_OF_PIXELS = re.compile(r"\w*(?:Decode|Fill|LZW|ZIP|JPEG|Pack)\w*: ")
_heard = threading.local()


def _listening() -> object:
    """Have libtiff call `hear`; None where Pillow was built without it, or holds it hidden."""
    try:
        library, c_library = ctypes.CDLL(_imaging.__file__), ctypes.CDLL(None)
        set_handler, print_into = library.TIFFSetErrorHandler, c_library.vsnprintf
    except (AttributeError, OSError, TypeError):
        return None
    print_into.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]

    def hear(module: bytes | None, message: bytes | None, arguments: int | None) -> None:
        buffer = ctypes.create_string_buffer(_MOST_BYTES)
        print_into(buffer, _MOST_BYTES, message or b"", arguments)
        said = buffer.value.decode("utf-8", "replace")
        place = (module or b"").decode("utf-8", "replace")
        # Pillow gives libtiff a name of its own for bytes that lie in memory.
        getattr(_heard, "remarks", []).append(said if place in ("", "tempfile.tif") else f"{place}: {said}")

    handler = _HANDLER(hear)
    set_handler.argtypes, set_handler.restype = [_HANDLER], ctypes.c_void_p
    set_handler(handler)
    return handler


_handler = _listening()  # which must live as long as libtiff calls it


@contextlib.contextmanager
def remarks_raised() -> Iterator[None]:
    """Within it a TIFF is read, in this thread.

    Raises:
        UnusableImageError: what libtiff said, if Pillow fails, or if pixels were lost on the way.
    """
    remarks: list[str] = []
    _heard.remarks = remarks
    try:
        yield
    except UnusableImageError:
        raise
    except Exception as error:
        if remarks and not isinstance(error, MemoryError):
            raise UnusableImageError(f"broken image: {remarks[-1].strip()}") from error
        raise
    finally:
        _heard.remarks = []
    if lost := [remark for remark in remarks if _OF_PIXELS.match(remark)]:
        raise UnusableImageError(f"broken image: {lost[0].strip()}")
