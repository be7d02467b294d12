"""Every kind of picture file is converted as its notes say, against an independent calculation, or refused in one line."""

import io
import struct

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from engine.errors import InputError
from engine.geometry import Box
from engine.io import picture_file
from engine.io.photo import PictureSource, open_photo, resampled_photo

HEIGHT, WIDTH = 24, 40
DEEP = "16 bits a sample; the output has 8"
FLAT = "transparency is flattened on white"
RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
GREY = RGB[..., :1]
ALPHA = np.broadcast_to(np.linspace(0, 255, WIDTH).astype(np.uint8)[:, None], (HEIGHT, WIDTH, 1))


def deep(pixels):
    """uint16 samples of which the high byte alone is not enough."""
    return pixels.astype(np.uint16) * 257 + np.where(pixels < 255, 100, 0).astype(np.uint16)


def flat(pixels, white=255):
    """Pixels on white under ``ALPHA``, in 8-bit levels."""
    share = ALPHA / 255
    return (pixels / white * share + 1 - share) * 255


def stack(*planes):
    return np.concatenate(planes, -1)


def levels(deep_pixels):
    return deep_pixels / 257


def tiff(path, pixels, **options):
    tifffile.imwrite(path, pixels.squeeze(), **options)


def pillow(path, pixels, **options):
    Image.fromarray(pixels.squeeze()).save(path, **options)


def libvips(path, pixels, interpretation, profile=None, **options):
    image = pyvips.Image.new_from_array(pixels, interpretation=interpretation).copy()
    if profile is not None:
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    image.write_to_file(str(path), **options)


def ppm(path, pixels, kind, white, comment=b""):
    depth = ">u2" if white > 255 else "u1"
    path.write_bytes(b"%b\n%b%d %d\n%d\n" % (kind, comment, WIDTH, HEIGHT, white) + pixels.astype(depth).tobytes())


def frames(path, **options):
    first = Image.fromarray(RGB)
    first.save(path, save_all=True, append_images=[first.rotate(180)], **options)


def gain_map(path):
    scene = pyvips.Image.new_from_array(RGB.astype(np.float32) / 128, interpretation="scrgb")
    pyvips.Operation.call("uhdrsave", scene, str(path), Q=100)


def sdr_of_gain_map(path):
    """Its base image is an ordinary JPEG in Display P3."""
    with Image.open(path) as image:
        return np.asarray(to_srgb(image))


def built_in(profile):
    return bytes(pyvips.Operation.call("profile_load", profile))


def to_srgb(image):
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info.get("icc_profile") or built_in("cmyk")))
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), intent, outputMode="RGB")


def from_cmyk(inks):
    return np.asarray(to_srgb(Image.fromarray(inks, "CMYK")))


INKS = stack(RGB, GREY // 3)
LAB = stack(
    np.random.default_rng(1).uniform(20, 90, (HEIGHT, WIDTH, 1)),
    np.random.default_rng(2).uniform(-15, 15, (HEIGHT, WIDTH, 2)),
)


def encoded_lab():
    """CIELAB in 16 bits as TIFF defines it: L* of 0 to 65535, a* and b* signed in steps of 1/256."""
    lightness, colours = LAB[..., :1] / 100 * 65535, (LAB[..., 1:] * 256).astype(np.int16).view(np.uint16)
    return stack(lightness.astype(np.uint16), colours)


def srgb_of_lab():
    """CIE 15 and IEC 61966-2-1, with the white of sRGB."""
    y = (LAB[..., 0] + 16) / 116
    f = np.stack([y + LAB[..., 1] / 500, y, y - LAB[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.95047, 1, 1.08883)
    matrix = [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
    linear = np.clip(xyz @ np.transpose(matrix), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
P3_NOTE = 'colours are converted to sRGB from the ICC profile "{}"'
IGNORED = "the ICC profile is damaged or of another kind of colours; it is ignored"
GUESSED = "CMYK is converted to sRGB by a generic profile, so colours may differ"
FIRST = "only the first of 2 pages or frames is read"

READ = {
    # name: (writer, levels in 8 bits, tolerance, notes)
    "grey.png": (lambda p: pillow(p, GREY), GREY, 0, ()),
    "grey.tif": (lambda p: tiff(p, GREY), GREY, 0, ()),
    "white-is-0.tif": (lambda p: tiff(p, GREY, photometric="miniswhite"), 255 - GREY.astype(int), 0, ()),
    "4-bit.tif": (lambda p: tiff(p, GREY >> 4, photometric="minisblack", bitspersample=4), (GREY >> 4) * 17, 0, ()),
    "grey-alpha.png": (lambda p: libvips(p, stack(GREY, ALPHA), "b-w"), flat(GREY), 1, (FLAT,)),
    "grey-alpha.tif": (
        lambda p: tiff(p, stack(GREY, ALPHA), photometric="minisblack", planarconfig="contig", extrasamples=[2]),
        flat(GREY), 1, (FLAT,),
    ),
    "rgb.tif": (lambda p: tiff(p, RGB, photometric="rgb"), RGB, 0, ()),
    "rgba.tif": (lambda p: tiff(p, stack(RGB, ALPHA), photometric="rgb", extrasamples=[2]), flat(RGB), 1, (FLAT,)),
    "premultiplied.tif": (
        lambda p: tiff(p, stack((RGB * (ALPHA / 255)).round().astype(np.uint8), ALPHA), photometric="rgb", extrasamples=[1]),
        flat(RGB), 2, (FLAT,),
    ),
    "deep.png": (lambda p: libvips(p, deep(RGB), "rgb16"), levels(deep(RGB)), 0.002, (DEEP,)),
    "deep-grey.tif": (lambda p: tiff(p, deep(GREY)), levels(deep(GREY)), 0.002, (DEEP,)),
    "deep-alpha.tif": (
        lambda p: tiff(p, stack(deep(RGB), ALPHA.astype(np.uint16) * 257), photometric="rgb", extrasamples=[2]),
        flat(deep(RGB), 65535), 0.01, (DEEP, FLAT),
    ),
    "cmyk.tif": (lambda p: tiff(p, INKS, photometric="separated"), from_cmyk(INKS), 11, (GUESSED,)),
    "deep-cmyk.tif": (
        lambda p: tiff(p, INKS.astype(np.uint16) * 257, photometric="separated"), from_cmyk(INKS), 11, (DEEP, GUESSED),
    ),
    "cmyk-profile.tif": (
        lambda p: libvips(p, INKS, "cmyk", built_in("cmyk")),
        from_cmyk(INKS), 2, ('CMYK is converted to sRGB by its ICC profile "{}"',),
    ),
    "lab.tif": (
        lambda p: tiff(p, encoded_lab(), photometric="cielab"), srgb_of_lab(), 1.5, (DEEP, "CIELAB is converted to sRGB"),
    ),
    "srgb.png": (lambda p: libvips(p, RGB, "srgb", SRGB), RGB, 1, ()),
    "foreign-profile.tif": (lambda p: pillow(p, RGB, icc_profile=built_in("cmyk")), RGB, 0, (IGNORED,)),
    "damaged-profile.tif": (lambda p: pillow(p, RGB, icc_profile=b"x" * 999), RGB, 0, (IGNORED,)),
    "gain-map.jpg": (gain_map, sdr_of_gain_map, 3, (P3_NOTE, "the HDR gain map is ignored")),
    "8.avif": (lambda p: libvips(p, RGB, "srgb", lossless=True), RGB, 2, ()),
    "10.avif": (
        lambda p: libvips(p, deep(RGB), "rgb16", lossless=True, bitdepth=10),
        levels(deep(RGB)), 2, ("10 bits a sample; the output has 8",),
    ),
    "pages.tif": (frames, RGB, 0, (FIRST,)),
    "pyramid.tif": (lambda p: libvips(p, RGB, "srgb", tile=True, pyramid=True, tile_width=16, tile_height=16), RGB, 0, ()),
    "animation.webp": (lambda p: frames(p, lossless=True), RGB, 0, (FIRST,)),
    "animation.png": (frames, RGB, 0, (FIRST,)),
    "p5.pgm": (lambda p: ppm(p, GREY, b"P5", 255, b"# a comment\n"), GREY, 0, ()),
    "p6.ppm": (lambda p: ppm(p, RGB, b"P6", 255), RGB, 0, ()),
    "deep.pgm": (lambda p: ppm(p, deep(GREY), b"P5", 65535), levels(deep(GREY)), 0.002, (DEEP,)),
    "deep.ppm": (lambda p: ppm(p, deep(RGB), b"P6", 65535), levels(deep(RGB)), 0.002, (DEEP,)),
    "24-bit.bmp": (lambda p: pillow(p, RGB), RGB, 0, ()),
    "grey.bmp": (lambda p: pillow(p, GREY), GREY, 0, ()),
    "1-bit.bmp": (lambda p: pillow(p, GREY > 99), (GREY > 99) * 255, 0, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_pictures_are_converted_as_their_notes_say(tmp_path, name):
    write, expected, tolerance, notes = READ[name]
    path = tmp_path / name
    write(path)
    source, photo = PictureSource(path), open_photo(path, 1)
    assert [note.split('"')[0] for note in source.notes] == [note.split('"')[0] for note in notes]
    assert photo.notes == source.notes
    pixels = source.read(Box(0, 0, *source.size)).permute(1, 2, 0).numpy() * 255
    if callable(expected):
        expected = expected(path)
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, (HEIGHT, WIDTH, 3)), atol=tolerance + 1e-3)
    trained_on = resampled_photo(photo, (HEIGHT, WIDTH))
    np.testing.assert_allclose(trained_on, pixels, atol=1.6)


def test_the_name_of_a_profile_is_told(tmp_path):
    libvips(tmp_path / "a.png", RGB, "srgb", built_in("p3"))
    (note,) = PictureSource(tmp_path / "a.png").notes
    assert note == 'colours are converted to sRGB from the ICC profile "sP3C"'


def chunk(name, content):
    info = PngImagePlugin.PngInfo()
    info.add(name, content)
    return info


def hdr_avif(path):
    libvips(path, RGB, "srgb", lossless=True)
    content = path.read_bytes()
    codes = content.index(b"colrnclx") + 8
    path.write_bytes(content[:codes] + struct.pack(">HH", 9, 16) + content[codes + 4 :])


def with_(dtype, pixels, **options):
    return lambda path: tiff(path, pixels.astype(dtype), **options)


REFUSED = {
    "five.tif": (with_(np.uint8, stack(RGB, GREY, GREY), photometric="rgb"), "5 samples a pixel, and RGB without"),
    "two.tif": (
        with_(np.uint8, stack(GREY, GREY), photometric="minisblack", planarconfig="contig"),
        "2 samples a pixel, and grey without marked alpha has 1",
    ),
    "infrared.tif": (
        with_(np.uint8, stack(RGB, GREY), photometric="rgb", extrasamples=[0]),
        "4 samples a pixel, and RGB without marked alpha has 3",
    ),
    "bands.tif": (with_(np.uint8, RGB, photometric="minisblack", planarconfig="contig"), "3 samples a pixel, and grey"),
    "cmyk-alpha.tif": (with_(np.uint8, stack(INKS, ALPHA), photometric="separated", extrasamples=[2]), "5 samples a pixel"),
    "float64.tif": (with_(np.float64, RGB, photometric="rgb"), "float64 samples are not read (only"),
    "inks.tif": (with_(np.float32, INKS, photometric="separated"), "float32 samples are not read (only"),
    "int8.tif": (with_(np.int8, GREY // 2), "int8 samples are not read (only"),
    "int16.tif": (with_(np.int16, GREY.astype(int) - 99), "int16 samples are not read (only"),
    "int32.tif": (with_(np.int32, GREY), "int32 samples are not read (only"),
    "uint32.tif": (with_(np.uint32, GREY.astype(np.uint32) << 24), "uint32 samples are not read (only"),
    "12-bit.tif": (with_(np.uint16, GREY.astype(int) * 16, bitspersample=12), "uint12 samples are not read (only"),
    "a.v": (lambda p: libvips(p, RGB, "srgb"), "cannot be read as a picture (unknown format); convert it"),
    "a.csv": (lambda p: p.write_text("1.5,2.5\n3.5,4.5\n"), "cannot be read as a picture (unknown format); convert it"),
    "drawing.svg": (
        lambda p: p.write_text('<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        "SVG is not read; convert it",
    ),
    "lab.tif": (with_(np.uint8, RGB, photometric="cielab"), "CIELAB of 8 bits is not read (only of 16)"),
    "cfa.tif": (with_(np.uint16, GREY, photometric="cfa"), "begins with a thumbnail or a camera's raw samples"),
    "preview.tif": (with_(np.uint8, RGB, photometric="rgb", subfiletype=1), "begins with a thumbnail"),
    "a.cr2": (lambda p: p.write_bytes(b"II*\0\x10\0\0\0CR\x02\0" + bytes(99)), "a camera's raw file; develop it"),
    "gamma.png": (lambda p: pillow(p, RGB, pnginfo=chunk(b"gAMA", struct.pack(">I", 100000))), "its gamma is 1 (sRGB: 0.4545"),
    "hdr.png": (lambda p: pillow(p, RGB, pnginfo=chunk(b"cICP", bytes([9, 16, 0, 1]))), "coded for HDR or a wide gamut"),
    "hdr.avif": (hdr_avif, "coded for HDR or a wide gamut (CICP primaries 9, transfer 16); convert it to sRGB"),
    "a.jp2": (lambda p: pillow(p, RGB), "JPEG 2000 is not read; convert it to PNG, TIFF or JPEG"),
    "a.pfm": (lambda p: pillow(p, GREY.astype(np.float32)), "PFM is not read; convert it"),
    "a.ico": (lambda p: pillow(p, RGB), "Windows icon is not read; convert it"),
    "a.tga": (lambda p: pillow(p, RGB), "cannot be read as a picture (unknown format); convert it"),
    "12-bit.pgm": (lambda p: ppm(p, GREY, b"P5", 4095), "not a binary PGM or PPM whose white is 255 or 65535"),
    "plain.ppm": (lambda p: ppm(p, RGB, b"P3", 255), "not a binary PGM or PPM"),
    "cut.ppm": (lambda p: ppm(p, RGB[:9], b"P6", 255), "cannot be read as a picture"),
    "cut.bmp": (lambda p: (pillow(p, RGB), p.write_bytes(p.read_bytes()[:500])), "cannot be read as a picture"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_guessed_is_refused(tmp_path, name):
    write, reason = REFUSED[name]
    path = tmp_path / name
    write(path)
    for decode in (PictureSource, lambda path: open_photo(path, 1)):
        with pytest.raises(InputError) as caught:
            decode(path)
        assert str(caught.value).startswith(f"{path}: {reason}")
        assert "\n" not in str(caught.value)
        assert "; " in str(caught.value)  # what to do


@pytest.mark.parametrize(
    ("brand", "format_name"),
    [(b"ftypheic", "HEIC"), (b"JXL \r\n\x87\n", "JPEG XL")],
)
def test_boxed_formats_are_named(tmp_path, brand, format_name):
    path = tmp_path / "a.png"
    path.write_bytes(b"\0\0\0\x0c" + brand + bytes(50))
    with pytest.raises(InputError, match=f"a.png: {format_name} is not read; convert it"):
        PictureSource(path)


def test_a_gamma_with_a_profile_is_read(tmp_path):
    """The profile says more than the gamma."""
    pillow(tmp_path / "a.png", RGB, pnginfo=chunk(b"gAMA", struct.pack(">I", 100000)), icc_profile=SRGB)
    assert PictureSource(tmp_path / "a.png").notes == ()


def test_a_large_bmp_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    pillow(tmp_path / "a.bmp", RGB)
    monkeypatch.setattr(picture_file, "BMP_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(
        InputError, match=r"a.bmp: a BMP is read up to .* megapixels, and this one is larger; convert it"
    ):
        PictureSource(tmp_path / "a.bmp")


def test_a_whole_picture_is_not_called_damaged(tmp_path):
    """libvips tells a read that failed by the line that it missed, as it does of a damaged file."""
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    error = pyvips.Error("unable to write", "vipspng: out of order read at line 12")
    with pytest.raises(OSError, match="Input/output error"), picture_file.decoding(path):
        raise error
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(InputError, match="cannot be read as a picture"), picture_file.decoding(path):
        raise error
