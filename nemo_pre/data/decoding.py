"""The one place where pictures are opened and decoded, for preparation, validation, training, features, generation,
diagnosis and reports.

- The formats are :data:`FORMATS`, of which the first frame is taken; none of their decoders runs another program.
- A picture of more than :data:`MOST_PIXELS` is refused by its header, whatever limit Pillow has: NeMo raises that to
  933 million for the whole process. A file that is cut is refused, whatever ``ImageFile.LOAD_TRUNCATED_IMAGES`` says.
- EXIF's orientation is obeyed, in sizes too, as ``transformers.image_utils.load_image`` does; EXIF that cannot be read
  says nothing.
- Grey of more than 8 bits keeps its 8 highest bits, as Pillow does with colours of 16 bits: that undoes both ways of
  making 16 bits of 8, times 256 and times 257. Whole numbers of 32 bits are taken for what they can be, 0 to 255 or 0
  to 65535, and floats for 0 to 1 as well; other values are refused.
- Transparency is left out, and the colours beneath it show, as in ``transformers``' ``convert_to_rgb``. Palettes
  become colours, CMYK becomes RGB by Pillow's plain formula.

Raise :data:`DECODING` whenever a picture comes out otherwise than before: stored features say which they are of.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nemo_pre.data.errors import SampleError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

DECODING = 2  # 1: grey of 16 bits was cut to white, and EXIF's orientation passed over
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 178_956_970  # what Pillow itself takes for a decompression bomb, before anyone raises it
ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # tags of TIFF and EXIF
LATE_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # what may follow a PNG's pixels
GREY = ("1", "L", "LA", "La")


class UnreadablePicture(ValueError):
    """These bytes are no picture that can be used.

    Attributes:
        too_large: it has too many pixels; else it cannot be decoded.
    """

    def __init__(self, detail: str, too_large: bool = False) -> None:
        super().__init__(detail)
        self.too_large = too_large


def decode(source: bytes | Image) -> Image:
    """The picture upright with 8 bits a channel, in mode ``L`` or ``RGB``, without anything else that its file said.

    Raises:
        UnreadablePicture: it is damaged, cut, too large, of another format, or of values that are no picture's.
    """
    with _refusing():
        image = _opened(source) if isinstance(source, bytes) else _limited(source)
        image.load()
        turn = _turn(image)
        picture = _eight_bits(image)
        picture.info = {}  # the orientation too, or it would be obeyed again
        return picture if turn is None else picture.transpose(turn)


def header_size(content: bytes) -> tuple[int, int]:
    """Width and height of the picture that :func:`decode` gives, by the header.

    Raises:
        UnreadablePicture: there is none, or it states too many pixels.
    """
    with _refusing():
        return upright_size(_opened(content), content)


def open_header(content: bytes) -> Image:
    """The picture as Pillow opens it, its pixels not decoded, for its format and mode.

    Raises:
        UnreadablePicture: as :func:`header_size`.
    """
    with _refusing():
        return _opened(content)


def upright_size(image: Image, content: bytes) -> tuple[int, int]:
    """Width and height of an opened picture when it stands upright."""
    # Pillow gives a TIFF's size turned, and would decode a PNG in search of EXIF behind its pixels.
    if image.format == "TIFF":
        return image.size
    if image.format == "PNG" and "exif" not in image.info and not any(name in content for name in LATE_ORIENTATION):
        return image.size
    width, height = image.size
    turn = _turn(image)
    from PIL.Image import Transpose

    sideways = (Transpose.TRANSPOSE, Transpose.TRANSVERSE, Transpose.ROTATE_90, Transpose.ROTATE_270)
    return (height, width) if turn in sideways else (width, height)


def decode_labels(content: bytes) -> Image:
    """A map of labels in mode ``L``: the grey values, or the numbers of a palette's colours, as they are.

    Raises:
        UnreadablePicture: it cannot be decoded, or its pixels are no numbers from 0 to 255.
    """
    import numpy as np
    from PIL import Image

    with _refusing():
        image = _opened(content)
        image.load()
        if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
            raise UnreadablePicture(f"it is in mode {image.mode}, whose pixels are no labels")
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 255):
            raise UnreadablePicture(f"its labels go from {values.min()} to {values.max()}, not from 0 to 255")
        return Image.fromarray(values.astype(np.uint8))


def decoded(source: bytes | Image, where: str) -> Image:
    """:func:`decode` in RGB, of a sample.

    Raises:
        SampleError: the picture cannot be used; it begins with ``where``.
    """
    with of_sample(where):
        picture = decode(source)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@contextmanager
def of_sample(where: str) -> Iterator[None]:
    """Turns what is wrong with a picture into what is wrong with its sample."""
    try:
        yield
    except UnreadablePicture as error:
        problem = "is too large" if error.too_large else "cannot be decoded"
        raise SampleError(f"{where} has an image that {problem} ({error})") from error


def is_one_colour(picture: Image) -> bool:
    """Whether all pixels of a decoded picture are the same."""
    extrema: Any = picture.getextrema()
    return all(low == high for low, high in (extrema if isinstance(extrema[0], tuple) else [extrema]))


def _opened(content: bytes) -> Image:
    from PIL import Image

    return _limited(Image.open(io.BytesIO(content), formats=FORMATS))


def _limited(image: Image) -> Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnreadablePicture(f"it has {width} x {height} pixels")
    if width * height > MOST_PIXELS:
        raise UnreadablePicture(f"{width} x {height} pixels, more than {MOST_PIXELS:,}", too_large=True)
    return image


@contextmanager
def _refusing() -> Iterator[None]:
    """Pillow's errors as ours, and its process-wide switches as they must be here."""
    from PIL import Image, ImageFile

    tolerated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, and of large images, which are judged here
            yield
    except UnreadablePicture:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadablePicture(str(error), too_large=True) from error
    except Image.UnidentifiedImageError as error:  # it names the buffer by its address, which differs from run to run
        raise UnreadablePicture(f"it is no {', '.join(FORMATS)} file") from error
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise UnreadablePicture(str(error) or repr(error)) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerated


def _turn(image: Image) -> Any:
    """Pillow's transposition that puts the picture upright; None if it stands so, or does not say.

    A TIFF is turned by Pillow when it is loaded, and then says so no more.
    """
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(ORIENTATION))  # type: ignore[arg-type]
    except Exception:  # EXIF is written by everyone, and the picture does not depend on it
        return None


def _eight_bits(image: Image) -> Image:
    """A new picture in mode ``L`` or ``RGB``."""
    import numpy as np
    from PIL import Image as Pictures

    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(BITS, (16,))[0]
        values = np.asarray(image) >> (bits - 8)
        if tags.get(PHOTOMETRIC) == 0:  # white is 0, which Pillow sees to where there are 8 bits
            values = 255 - values
        return Pictures.fromarray(values.astype(np.uint8))
    if image.mode in ("I", "F"):
        return Pictures.fromarray(_of_known_range(np.asarray(image)))
    return image.convert("L" if image.mode in GREY else "RGB")


def _of_known_range(values: np.ndarray) -> np.ndarray:
    """uint8 of the numbers of a picture that does not say which is white."""
    import numpy as np

    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):  # nor is it with NaN
        raise UnreadablePicture(
            f"its values go from {low:g} to {high:g}, and a picture's from 0 to 255 or 65535, or as floats to 1"
        )
    if values.dtype.kind == "f":
        scale = 255 if high <= 1 else 1 if high <= 255 else 1 / 256
        return np.minimum(np.round(values * scale) if high <= 255 else values * scale, 255).astype(np.uint8)
    return (values if high <= 255 else values >> 8).astype(np.uint8)
