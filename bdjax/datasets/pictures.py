"""Image files as a viewer shows them: what a file says of its pixels is applied, or the file is
refused; nothing that it says is skipped.
"""

import functools
import io
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bdjax import schema
from bdjax.types import BadInput

FORMATS = "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"
"""What is read, known by content: none of these calls another program."""
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""White point and primaries, as PNG has them."""


def picture(path: Path) -> Any:
    """The image at `path`, turned upright, in sRGB with 8 bits, on white where it is transparent: a
    PIL image, "L" where it is grey, else "RGB"; `BadInput` where it cannot be shown so.

    Refused: several frames or pages, more than 16 bits or floating point, a colour profile that is
    damaged or of other colours, damaged and huge images.
    """
    # By its name, PIL would map a TIFF into memory, and mix up one that lies on its side.
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise BadInput(f"{path}: cannot be read as an image ({error})") from error
    with stream:
        return decoded(path, stream)


def decoded(where: object, stream: BinaryIO) -> Any:
    """As `picture`, of the bytes of an image file; `where` they are."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream, formats=FORMATS) as file:
                return _shown(file)
    except Exception as error:  # Whatever a damaged image makes PIL raise.
        why = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):  # its text is of the stream
            why = "damaged, or of a format that is not read"
        raise BadInput(f"{where}: cannot be read as an image ({why})") from error


def stacked(where: object, pictures: Iterable[Any], count: int, size: int | None) -> np.ndarray:
    """`count` of `picture`'s images as `[N, H, W, C]`, resized to `size`×`size`, or, where that is
    None, all of one size as they are; grey if all of them are, else RGB.
    """
    from PIL import Image

    found = np.zeros((0, 0, 0, 1), np.uint8)
    number = 0
    for number, image in enumerate(pictures, 1):
        image = image if size is None else image.resize((size, size), Image.Resampling.BILINEAR)
        side = (image.height, image.width)
        if number == 1:
            need, most = 3 * math.prod(side) * count, schema.memory() // 2
            if need > most:
                raise BadInput(
                    f"{where}: its images take {schema.gigabytes(need)} at size "
                    f"{side[0]}×{side[1]}; at most {schema.gigabytes(most)} are read here: give a "
                    "smaller size"
                )
            found = np.empty((count, *side, 1), np.uint8)
        if side != found.shape[1:3]:
            raise BadInput(
                f"{where}: its images are of different sizes, image {number} is {side[0]}×{side[1]}"
                f" and those before it {found.shape[1]}×{found.shape[2]}: give a size for all"
            )
        if image.mode != "L" and found.shape[-1] == 1:  # until here all were grey
            found = np.repeat(found, 3, -1)
        if number <= count:
            mode = "L" if found.shape[-1] == 1 else "RGB"
            found[number - 1] = np.asarray(image.convert(mode)).reshape(found.shape[1:])
    if number != count:
        raise BadInput(f"{where}: has {number} images where {count} are announced")
    return found


def _shown(file: Any) -> Any:
    from PIL import Image, ImageOps

    # The frames of an MPO, a camera's JPEG, are previews and the other eye.
    if (frames := getattr(file, "n_frames", 1)) > 1 and file.format != "MPO":
        raise ValueError(f"it has {frames} frames or pages: save one of them as an image")
    file.load()
    said, image = dict(file.info), _eight_bits(file, ImageOps.exif_transpose(file))
    alpha = None
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
    if image.mode in ("1", "L", "LA"):
        image = image.convert("L")
    elif image.mode != "CMYK":
        image = image.convert("RGB")
    image = _in_srgb(image, said)
    if alpha is None:
        return image
    white = Image.new(image.mode, image.size, "white")
    white.paste(image, mask=alpha)
    return white


def _eight_bits(file: Any, image: Any) -> Any:
    """`image`, of `file`, with 8 bits a channel: PIL itself scales colours, but not grey."""
    from PIL import Image

    if image.mode[0] not in "IF":
        return image
    if image.mode[:4] != "I;16" and (image.mode, file.format) != ("I", "PPM"):
        raise ValueError("it has 32 bits a pixel or floating point: save it with 8 or 16 bits")
    if "transparency" in file.info:
        raise ValueError("it has 16 bits and a transparent grey: save it with 8 bits")
    pixels = np.asarray(image).astype(np.float64) / 257
    if file.format == "TIFF" and file.tag_v2.get(262) == 0:  # 0 is white
        pixels = 255 - pixels
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _in_srgb(image: Any, said: dict[str, Any]) -> Any:
    """`image`, "L", "RGB" or "CMYK", from the colours that the file says it has to sRGB."""
    from PIL import ImageCms

    if icc := said.get("icc_profile"):
        try:
            space, transform = _transform(icc)
        except (OSError, TypeError, ImageCms.PyCMSError):
            raise ValueError("its colour profile is damaged: save it in sRGB") from None
        if image.mode == "L" and space == "RGB":  # grey in an RGB space
            image = image.convert("RGB")
            ImageCms.applyTransform(image, transform, inPlace=True)
            return image.convert("L")
        if image.mode != space:
            raise ValueError(f"its colour profile is for {space}, not for {image.mode} pixels")
        made: Any = ImageCms.applyTransform(image, transform)
        return made.convert("L") if image.mode == "L" else made
    image = image.convert("RGB") if image.mode == "CMYK" else image
    if "gamma" in said and "srgb" not in said:  # PNG
        if np.abs(np.subtract(said.get("chromaticity", SRGB), SRGB)).max() > 0.01:
            raise ValueError("it has colours of its own (cHRM): save it in sRGB")
        power = 1 / (2.2 * said["gamma"])
        if abs(power - 1) > 0.01:
            table = [round(255 * (value / 255) ** power) for value in range(256)]
            image = image.point(table * len(image.getbands()))
    return image


@functools.lru_cache(maxsize=64)
def _transform(icc: bytes) -> tuple[str, Any]:
    """The colours of a profile, as PIL's mode, and the transformation into sRGB."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    about: Any = profile.profile
    space: str = about.xcolor_space.strip().replace("GRAY", "L")
    if space not in ("L", "RGB", "CMYK"):
        return space, None
    return space, ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), space, "RGB")
