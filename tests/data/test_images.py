"""Opening, orienting, colour modes, the resize rule and normalisation."""

import hashlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from echo4o.data.errors import RowError
from echo4o.data.images import ImageTransform, fit_pixels, open_image, probe_size, to_rgb
from tests.data.rows_on_disk import encoded, random_picture


@pytest.fixture(scope="module")
def golden(request):
    parity = request.getfixturevalue("parity")
    folder = parity / "pure"
    return json.loads((folder / "pure.json").read_text()), load_file(folder / "pure.safetensors"), folder


def test_target_sizes_are_the_references(golden):
    values, _, _ = golden
    transforms = {name: ImageTransform(**config) for name, config in values["transform_configs"].items()}
    for name, img_num, width, height, *expected in values["transform_sizes"]:
        assert list(transforms[name].target_size(width, height, img_num)) == expected


def test_transformed_images_are_the_references(golden):
    values, tensors, _ = golden
    for name, expected in values["transformed"].items():
        image = Image.fromarray(tensors[f"transform/{name}/input"].numpy().copy())
        result = ImageTransform(**values["transform_configs"][name])(image, expected["img_num"])
        pixels = ((result * 0.5 + 0.5) * 255).round().to(torch.uint8)
        assert list(result.shape) == expected["shape"] and result.dtype == torch.float32
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == expected["sha256_resized_u8_chw"]
        assert result.double().sum().item() == pytest.approx(expected["sum"], rel=1e-6)
        exact = pixels.to(torch.float32).div(255).sub(0.5).div(0.5)
        assert torch.equal(result, exact)


def test_transparency_is_pasted_on_white_as_the_reference_does(golden):
    _, tensors, folder = golden
    for mode, name in [("RGBA", "rgba"), ("LA", "la")]:
        result = to_rgb(Image.fromarray(tensors[f"rgb/{name}_in"].numpy().copy(), mode))
        assert np.array_equal(np.asarray(result), tensors[f"rgb/{name}_out"].numpy())
    palette = open_image(folder / "palette_transparent.png")
    assert np.array_equal(np.asarray(palette), tensors["rgb/palette_png_out"].numpy())


TRANSFORMS = st.builds(
    lambda stride, low, extra, cap: ImageTransform(stride * (low + extra), stride * low, stride, pixel_cap=cap),
    st.sampled_from([14, 16]),
    st.integers(1, 20),
    st.integers(0, 40),
    st.sampled_from(["linear", "sqrt"]),
)


@given(TRANSFORMS, st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 12))
def test_target_sizes_are_within_the_limits(transform, width, height, img_num):
    new_width, new_height = transform.target_size(width, height, img_num)
    assert new_width % transform.image_stride == new_height % transform.image_stride == 0
    assert transform.image_stride <= min(new_width, new_height)
    assert max(new_width, new_height) <= transform.max_image_size
    assert transform.target_size(height, width, img_num) == (new_height, new_width)


def test_the_square_root_cap_keeps_more_of_the_image():
    linear = ImageTransform(980, 378, 14, max_pixels=2007040)
    sqrt = ImageTransform(980, 378, 14, max_pixels=2007040, pixel_cap="sqrt")
    assert linear.target_size(1000, 1000, 4) == (518, 518)
    assert sqrt.target_size(1000, 1000, 4) == (714, 714)
    with pytest.raises(ValueError, match="linear, sqrt"):
        ImageTransform(980, 378, 14, pixel_cap="cubic")


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(400, 2_000_000))
def test_fit_pixels_meets_the_budget(width, height, budget):
    stride = 16
    width, height = max(stride, width // stride * stride), max(stride, height // stride * stride)
    new_width, new_height = fit_pixels(width, height, budget, stride)
    assert new_width % stride == new_height % stride == 0
    assert new_width * new_height <= budget or stride in (new_width, new_height)
    assert (new_width, new_height) == (width, height) if width * height <= budget else new_width <= width


# --- colour modes and depth ---------------------------------------------------------------------------------------


def test_deep_grey_is_scaled_not_clipped():
    values = np.array([[0, 257 * 10, 257 * 128, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    assert np.asarray(open_image(buffer.getvalue()))[0, :, 0].tolist() == [0, 10, 128, 255]
    tiff = io.BytesIO()
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tiff, "TIFF")
    assert np.asarray(open_image(tiff.getvalue()))[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode, format", [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("L", "PNG"), ("1", "PNG"), ("P", "GIF")])
def test_every_colour_mode_becomes_rgb(mode, format):
    picture = random_picture(0, 20, 10).resize((40, 20)).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, format)
    opened = open_image(buffer.getvalue())
    assert opened.mode == "RGB" and opened.size == probe_size(buffer.getvalue()) == (40, 20)
    assert np.asarray(opened).std() > 10


def test_cmyk_white_stays_white():
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(buffer, "JPEG", quality=95)
    assert np.asarray(open_image(buffer.getvalue())).min() > 250


# --- orientation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    picture = Image.new("RGB", (48, 32), (10, 10, 10))
    picture.paste((250, 250, 250), (0, 0, 24, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, format, exif=exif)
    opened = open_image(buffer.getvalue())
    assert opened.size == probe_size(buffer.getvalue()) == ((32, 48) if orientation >= 5 else (48, 32))
    right, bottom = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    corner = (opened.width - 4 if right else 4, opened.height - 4 if bottom else 4)
    bright = [opened.getpixel((x, y))[0] > 128 for x, y in [corner, (opened.width // 2, opened.height - corner[1])]]
    assert bright == [True, False]


# --- broken images ------------------------------------------------------------------------------------------------


def huge_png(width, height):
    """A PNG header that announces a huge image; small as a file."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for name, data in [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ]:
        chunks += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return chunks


def test_headers_that_cannot_be_read():
    for data, reason in [
        (b"", "image empty"),
        (b"not an image at all", "image unreadable"),
        (encoded()[:12], "image unreadable"),
        (huge_png(50_000, 50_000), "image too large"),
    ]:
        for read in (probe_size, open_image):
            with pytest.raises(RowError) as caught:
                read(data)
            assert caught.value.reason == reason


def test_files_that_are_not_there_or_empty(tmp_path):
    (tmp_path / "empty.jpg").touch()
    for path, reason in [("absent.jpg", "image missing"), ("empty.jpg", "image empty"), ("", "image missing")]:
        with pytest.raises(RowError) as caught:
            probe_size(tmp_path / path)
        assert caught.value.reason == reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_found_on_decoding(format):
    buffer = io.BytesIO()
    random_picture(1, 200, 150).save(buffer, format)
    data = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    with pytest.raises(RowError) as caught:
        probe_size(data)
        open_image(data)
    assert caught.value.reason in ("image truncated", "image unreadable")


def test_the_pixel_limit_is_an_argument(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(100, 100))
    assert open_image(path, pixel_limit=10_000).size == (100, 100)
    with pytest.raises(RowError, match="100 × 100 px; the limit is 9999") as caught:
        open_image(path, pixel_limit=9_999)
    assert caught.value.reason == "image too large"


@given(st.binary(max_size=300))
def test_no_bytes_escape_as_another_error(data):
    image = bytearray(encoded(20, 20, format="JPEG"))
    image[30 : 30 + len(data)] = data
    try:
        open_image(bytes(image))
    except RowError as error:
        assert error.reason.startswith("image ")


# --- real photographs ---------------------------------------------------------------------------------------------


def test_real_photographs_keep_their_content():
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    transform = ImageTransform(512, 256, 16)
    for pixels in images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
        result = transform(open_image(buffer.getvalue()))
        size = probe_size(buffer.getvalue())
        assert tuple(result.shape) == (3, *reversed(transform.target_size(*size)))
        assert result.mean().item() == pytest.approx(pixels.mean() / 127.5 - 1, abs=0.02)
        assert result.min() >= -1 and result.max() <= 1
