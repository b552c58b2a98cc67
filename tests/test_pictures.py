"""Image files are read as a viewer shows them, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from bdjax import datasets
from bdjax.datasets.pictures import picture
from bdjax.types import BadInput

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 8)).astype(np.uint8)
COLOR = RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8)
ALPHA = RNG.integers(0, 256, (6, 8)).astype(np.uint8)


@pytest.fixture
def shown(tmp_path):
    """What is read of an image that PIL saves, or of bytes."""

    def read(image, suffix="png", **options):
        path = tmp_path / f"a.{suffix}"
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path, **options)
        found = picture(path)
        assert found.mode in ("L", "RGB")
        return np.asarray(found)

    return read


def on_white(color, alpha):
    alpha = alpha.astype(float) / 255
    alpha = alpha[..., None] if color.ndim == 3 else alpha
    return color * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "pgm", "gif"])
def test_plain_grey(shown, suffix):
    found = shown(Image.fromarray(GREY), suffix)
    np.testing.assert_array_equal(found if found.ndim == 2 else found[..., 0], GREY)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_plain_color(shown, suffix):
    np.testing.assert_array_equal(shown(Image.fromarray(COLOR), suffix), COLOR)


def test_one_bit(shown):
    found = shown(Image.fromarray(GREY > 127))
    np.testing.assert_array_equal(found, 255 * (GREY > 127))


def test_transparency_is_on_white(shown):
    rgba = np.dstack([COLOR, ALPHA])
    np.testing.assert_allclose(shown(Image.fromarray(rgba)), on_white(COLOR, ALPHA), atol=1)
    la = np.dstack([GREY, ALPHA])
    np.testing.assert_allclose(shown(Image.fromarray(la)), on_white(GREY, ALPHA), atol=1)
    palette = Image.fromarray(COLOR).quantize(16)
    plain = np.asarray(palette.convert("RGB"))
    clear = np.asarray(palette) == 3
    assert clear.any() and not clear.all()
    for suffix in ("png", "gif"):
        found = shown(palette, suffix, transparency=3)
        np.testing.assert_array_equal(found, np.where(clear[..., None], 255, plain))
    key = tuple(map(int, COLOR[0, 0]))
    found = shown(Image.fromarray(COLOR), transparency=key)
    assert (found[0, 0] == 255).all() and (found[1:] == COLOR[1:]).all()
    found = shown(Image.fromarray(GREY), transparency=int(GREY[0, 0]))
    np.testing.assert_array_equal(found, np.where(GREY[0, 0] == GREY, 255, GREY))


TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("turn", TURNED)
def test_orientation(shown, suffix, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    found = shown(Image.fromarray(COLOR), suffix, exif=exif, **options.get(suffix, {}))
    np.testing.assert_allclose(found, TURNED[turn](COLOR), atol=0 if suffix != "jpg" else 12)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(shown, suffix):
    deep = RNG.integers(0, 65536, (6, 8)).astype(np.uint16)
    found = shown(Image.fromarray(deep), suffix)
    np.testing.assert_array_equal(found, np.rint(deep / 257))


def test_sixteen_bits_turned_too(shown):
    deep = GREY.astype(np.uint16) * 257
    for suffix in ("png", "tif"):
        exif = Image.Exif()
        exif[0x0112] = 6
        found = shown(Image.fromarray(deep), suffix, exif=exif)
        np.testing.assert_array_equal(found, np.rot90(GREY, -1))


@pytest.mark.parametrize("deep", [False, True])
def test_zero_is_white(shown, deep):
    """TIFF with PhotometricInterpretation 0."""
    stored = GREY.astype("<u2") * 257 if deep else GREY
    tags = [(256, 8), (257, 6), (258, 16 if deep else 8), (259, 1), (262, 0), (273, 122), (277, 1)]
    tags += [(278, 6), (279, stored.nbytes)]
    head = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(tags))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    assert len(head) == 122
    np.testing.assert_array_equal(shown(head + stored.tobytes(), "tif"), 255 - GREY)


def profile(name):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def swapped():
    """A profile whose red and green have changed places: sRGB with the two tags exchanged."""
    data = bytearray(profile("sRGB"))
    for i in range(struct.unpack(">I", data[128:132])[0]):
        at = 132 + 12 * i
        data[at : at + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(
            bytes(data[at : at + 4]), bytes(data[at : at + 4])
        )
    return bytes(data)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_colour_profiles_are_applied(shown, suffix):
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    image = Image.fromarray(COLOR)
    found = shown(image, suffix, icc_profile=profile("sRGB"), **options)
    np.testing.assert_allclose(found, COLOR, atol=1)
    found = shown(image, suffix, icc_profile=swapped(), **options)
    np.testing.assert_allclose(found, COLOR[..., [1, 0, 2]], atol=3)
    rgba = Image.fromarray(np.dstack([COLOR, ALPHA]))
    found = shown(rgba, suffix, icc_profile=swapped(), **options)
    np.testing.assert_allclose(found, on_white(COLOR[..., [1, 0, 2]], ALPHA), atol=4)
    grey = shown(Image.fromarray(GREY), suffix, icc_profile=profile("sRGB"), **options)
    np.testing.assert_allclose(grey if grey.ndim == 2 else grey[..., 0], GREY, atol=1)


def test_colour_profiles_that_cannot_be_applied(shown):
    with pytest.raises(BadInput, match="profile is damaged"):
        shown(Image.fromarray(COLOR), icc_profile=b"nonsense" * 30)
    with pytest.raises(BadInput, match="profile is for Lab, not for RGB"):
        shown(Image.fromarray(COLOR), icc_profile=profile("LAB"))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_gamma_of_a_png(shown):
    stream = io.BytesIO()
    Image.fromarray(COLOR).save(stream, "png")
    data = stream.getvalue()

    def with_(*chunks):
        return data[:33] + b"".join(chunks) + data[33:]

    linear = chunk(b"gAMA", struct.pack(">I", 100_000))
    np.testing.assert_allclose(shown(with_(linear)), 255 * (COLOR / 255) ** (1 / 2.2), atol=0.5001)
    usual = chunk(b"gAMA", struct.pack(">I", 45_455))
    np.testing.assert_array_equal(shown(with_(usual)), COLOR)
    own = struct.pack(">8I", 31270, 32900, 73000, 27000, 30000, 60000, 15000, 6000)
    with pytest.raises(BadInput, match="colours of its own"):
        shown(with_(usual, chunk(b"cHRM", own)))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_printing_colours(shown, suffix):
    """Adobe's JPEG stores them inverted."""
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    cmyk = Image.fromarray(flat).convert("CMYK")
    found = shown(cmyk, suffix, **({"quality": 100} if suffix == "jpg" else {}))
    np.testing.assert_allclose(found, flat, atol=3)


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_several_frames_are_refused(shown, suffix):
    more = [Image.fromarray(COLOR[::-1].copy())]
    with pytest.raises(BadInput, match="it has 2 frames or pages"):
        shown(Image.fromarray(COLOR), suffix, save_all=True, append_images=more)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_more_than_sixteen_bits_are_refused(shown, dtype):
    with pytest.raises(BadInput, match="32 bits a pixel or floating point"):
        shown(Image.fromarray(GREY.astype(dtype)), "tif")


def test_a_transparent_grey_of_sixteen_bits_is_refused(shown):
    with pytest.raises(BadInput, match="transparent grey"):
        shown(Image.fromarray(GREY.astype(np.uint16) * 257), transparency=int(GREY[0, 0]) * 257)


def test_a_huge_image_is_refused(shown, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    for limit in (40, 20):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadInput, match=r"a\.png: cannot be read as an image \(Image size"):
            shown(Image.fromarray(GREY))


def test_no_program_is_called_and_the_suffix_decides_nothing(shown):
    with pytest.raises(BadInput, match="of a format that is not read"):
        shown(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n", "png")
    stream = io.BytesIO()
    Image.fromarray(COLOR).save(stream, "png")
    np.testing.assert_array_equal(shown(stream.getvalue(), "jpg"), COLOR)


def test_text_in_a_png_changes_nothing(shown):
    about = PngImagePlugin.PngInfo()
    about.add_text("Title", "x")
    np.testing.assert_array_equal(shown(Image.fromarray(COLOR), pnginfo=about), COLOR)


@pytest.mark.parametrize("high", [0, 2])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32])
def test_black_data_is_refused(tmp_path, dtype, high):
    path = tmp_path / "a.npz"
    image = np.zeros((40, 8, 8, 1), dtype)
    image[::2] = high
    np.savez(path, image=image, label=np.arange(40) % 4)
    with pytest.raises(
        BadInput, match=r"a\.npz: (no pixel of the training|pixels run from 0 to 0)"
    ):
        datasets.load("npz", path=str(path))
    bright = np.full_like(image, 3)
    np.savez(tmp_path / "b.npz", image=bright, label=np.arange(40) % 4)
    assert datasets.load("npz", path=str(tmp_path / "b.npz")).test.image.max() == 3
    with pytest.raises(BadInput, match=r"no pixel of the test images|run from 0 to 0"):
        datasets.load("npz", path=str(tmp_path / "b.npz"), test=str(path))
