"""What the Jetson runner reads: bundles, images and names of nodes, the same as the rest of uadx reads them."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from jetson_device import write_bundle
from PIL import Image

from uad_plugins import imaging
from uad_plugins.data.layouts.walking import images
from uad_plugins.deployment.jetson.uadx_jetson import imaging as on_device
from uad_plugins.deployment.jetson.uadx_jetson import overlay as device_overlay
from uad_plugins.deployment.jetson.uadx_jetson.bundle import read_bundle
from uad_plugins.deployment.jetson.uadx_jetson.files import RunnerError, write_atomically
from uad_plugins.deployment.jetson.uadx_jetson.onnx_nodes import node_names
from uad_plugins.detector import decode
from uad_plugins.evaluation import overlays
from uad_plugins.evaluation.predict import find_images
from uad_plugins.evaluation.rows import picture_names


def test_a_bundle_is_read(tmp_path):
    bundle = read_bundle(write_bundle(tmp_path))
    assert (bundle.height, bundle.width, bundle.input_name) == (6, 8, "input")
    assert (bundle.mean, bundle.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (bundle.score_name, bundle.map_name, bundle.onnx) == ("score", "map", tmp_path / "model.onnx")
    assert bundle.onnx_sha256 == hashlib.sha256(b"onnx").hexdigest()
    assert [bundle.threshold(category) for category in (None, "bolt", "nut")] == [0.5, -1.0, None]


def preprocessing(**changes):
    known = {"mean": [0, 0, 0], "std": [1, 1, 1], "resize": "bilinear", "antialias": True, "color": "RGB"}
    return {"preprocessing": {**known, **changes}}


HASH = hashlib.sha256(b"onnx").hexdigest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "uadx.bundle/2"}, "schema 'uadx.bundle/2' is not known here; this runner reads 'uadx.bundle/1'"),
        ({"schema": None}, "schema 'None' is not known here"),
        ({"files": {"model.onnx": {"sha256": "0" * 64, "bytes": 4}}}, "model.onnx: is not the file that was bundled"),
        ({"files": {"model.onnx": {"sha256": HASH, "bytes": 5}}}, "model.onnx: is not the file that was bundled"),
        ({"files": {"model.onnx": {"sha256": "", "bytes": 4}}}, "damaged: the SHA-256 of 'model.onnx' is none"),
        ({"files": {"model.onnx": {"bytes": 4}}}, "damaged: no key 'sha256'"),
        ({"files": {}}, "damaged: 'model.onnx' is not among its files"),
        ({"files": []}, "damaged: "),
        ({"files": {"more.txt": {"sha256": HASH, "bytes": 4}}}, "more.txt: is missing from the bundle"),
        ({"files": {"../a": {"sha256": HASH, "bytes": 4}}}, "'../a' lies outside the bundle"),
        ({"files": {"/etc/hosts": {"sha256": HASH, "bytes": 4}}}, "'/etc/hosts' lies outside the bundle"),
        ({"files": {"link": {"sha256": HASH, "bytes": 4}}}, "'link' lies outside the bundle"),
        (
            {"input": {"name": "input", "shape": [1, 1, 6, 8]}},
            "the input's shape is [1, 1, 6, 8], not [1, 3, height, width]",
        ),
        ({"input": {"name": "input", "shape": [1, 3, 6]}}, "damaged: not enough values"),
        ({"outputs": {"score": "score"}}, "damaged: no key 'map'"),
        (preprocessing(resize="nearest"), "preprocessing 'resize' is 'nearest'; this runner knows 'bilinear' alone"),
        (preprocessing(antialias=False), "preprocessing 'antialias' is False; this runner knows True alone"),
        (preprocessing(color="BGR"), "preprocessing 'color' is 'BGR'; this runner knows 'RGB' alone"),
        (preprocessing(std=[1, 0, 1]), "damaged: 'std' is not positive"),
        (preprocessing(mean=[1, 0]), "damaged: 'mean' is not three finite numbers"),
        ({"thresholds": {"pooled": {"value": "much"}, "categories": {}}}, "damaged: must be real number"),
        ({"thresholds": {"pooled": {"value": float("inf")}, "categories": {}}}, "damaged: a threshold is inf"),
    ],
)
def test_a_bundle_with_something_wrong_is_refused(tmp_path, changes, message):
    folder = write_bundle(tmp_path / "bundle", **changes)
    (tmp_path / "a").write_bytes(b"onnx")
    (folder / "link").symlink_to(tmp_path / "a")
    with pytest.raises(RunnerError) as error:
        read_bundle(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("before", "after"), [('"value": 0.5', '"value": 9.5'), ('"seal": "', '"seal": "0'), ("{", "{ ")])
def test_a_changed_manifest_is_refused(tmp_path, before, after):
    path = write_bundle(tmp_path) / "bundle.json"
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(RunnerError) as error:
        read_bundle(tmp_path)
    assert str(error.value) == f"{path}: is not what was bundled: its content has changed; copy the bundle again"


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(RunnerError, match=r"not a bundle \(bundle.json: No such file"):
        read_bundle(tmp_path)
    for content, message in (("{", "not valid JSON"), ("[]", "not the manifest of a bundle"), ("{}", "not the manifest")):
        (tmp_path / "bundle.json").write_text(content)
        with pytest.raises(RunnerError, match=message):
            read_bundle(tmp_path)
    (tmp_path / "b.zip").touch()
    with pytest.raises(RunnerError, match="unpack the bundle first: python3 -m zipfile -e b.zip b"):
        read_bundle(tmp_path / "b.zip")


def test_a_category_without_a_threshold_of_its_own_has_the_pooled_one(tmp_path):
    bundle = read_bundle(write_bundle(tmp_path, categories=["bolt", "gear"]))
    assert [bundle.threshold(category) for category in ("bolt", "gear", "nut")] == [-1.0, 0.5, None]
    with pytest.raises(RunnerError, match="category 'wheel' is not in this bundle; it knows: bolt, gear, nut"):
        bundle.threshold("wheel")


def test_keys_that_the_runner_does_not_know_do_not_matter(tmp_path):
    assert read_bundle(write_bundle(tmp_path, precision="int8", metrics={})).height == 6


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_atomically(tmp_path / "new" / "a", b"first")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "new" / "a", "no bytes")
    assert [path.read_bytes() for path in (tmp_path / "new").iterdir()] == [b"first"]
    (tmp_path / "file").touch()
    with pytest.raises(RunnerError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "a", b"")


def of_every_mode(folder):
    """Write pictures of every mode and orientation that the formats can hold."""
    rng = np.random.default_rng(3)
    colour = rng.integers(0, 256, (33, 47, 4)).astype(np.uint8)
    grey = colour[:, :, 0]
    palette = Image.fromarray(colour[:, :, :3]).quantize(16)
    transparent = palette.copy()
    transparent.info["transparency"] = bytes([0, 128, 255] * 5)
    alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(colour[:, :, 1])])
    wide = Image.fromarray(rng.integers(0, 65536, (33, 47)).astype(np.uint16))
    deep = Image.fromarray(rng.integers(-5, 70000, (33, 47)).astype(np.int32))
    pictures = {
        "l.png": Image.fromarray(grey),
        "one.png": Image.fromarray(grey).convert("1"),
        "la.png": alpha,
        "rgb.bmp": Image.fromarray(colour[:, :, :3]),
        "rgb.webp": Image.fromarray(colour[:, :, :3]),
        "rgba.png": Image.fromarray(colour),
        "p.png": palette,
        "transparent.png": transparent,
        "wide.png": wide,
        "wide.tif": wide,
        "deep.tif": deep,
        "cmyk.tif": Image.fromarray(colour[:, :, :3]).convert("CMYK"),
        "cmyk.jpg": Image.fromarray(colour[:, :, :3]).convert("CMYK"),
        "l.jpg": Image.fromarray(grey),
        "lab.tif": Image.fromarray(colour[:, :, :3]).convert("YCbCr"),
    }
    for name, picture in pictures.items():
        picture.save(folder / name)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for ending in ("jpg", "png", "tif", "webp"):
            Image.fromarray(colour[:, :, :3]).save(folder / f"turned{orientation}.{ending}", exif=exif)
    return sorted(folder.iterdir())


def test_every_image_is_read_and_resized_as_by_uadx(tmp_path):
    paths = of_every_mode(tmp_path)
    assert len(paths) == 15 + 8 * 4
    for path in paths:
        ours, theirs = on_device.read_rgb(str(path)), imaging.read_rgb(path)
        assert ours.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=path.name)
        for size in ((16, 20), (64, 50), (33, 47)):
            wanted = imaging.resize_rgb(theirs, size)
            np.testing.assert_array_equal(on_device.resize_rgb(ours, *size), wanted, err_msg=f"{path.name} {size}")
            # Detectors resize grey images before they become RGB.
            np.testing.assert_array_equal(decode(str(path), size).pixels, wanted, err_msg=f"{path.name} {size}")


@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_uadx_cannot_read_the_runner_cannot_either_for_the_same_reason(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture " * 30)
    (tmp_path / "folder.png").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "gif.png", format="GIF")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    header = b"IHDR" + struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    (tmp_path / "bomb.png").write_bytes(start + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT5\xaf\x06\x1e")
    names = ["cut.png", "empty.png", "text.png", "folder.png", "gif.png", "float.tif", "bomb.png", "missing.png"]
    for name in names:
        with pytest.raises(imaging.ImageError) as theirs:
            imaging.read_rgb(tmp_path / name)
        with pytest.raises(on_device.ImageError) as ours:
            on_device.read_rgb(str(tmp_path / name))
        assert f"{tmp_path / name}: {ours.value}" == theirs.value.message


def test_the_input_is_normalised(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    bundle = read_bundle(write_bundle(tmp_path))
    target = np.full((1, 3, 6, 8), np.nan, np.float32)
    on_device.Normaliser(bundle).fill(pixels, target)
    expected = ((pixels / 255 - bundle.mean) / bundle.std).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(target, expected, atol=2e-6)


def test_folders_are_walked_as_by_uadx(tmp_path):
    for name in ("b.png", "a.JPG", "deep/er/c.tif", ".hidden/d.png", ".e.png", "f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    single = str(tmp_path / "b.png")
    assert on_device.find_images([single, str(tmp_path), "missing.png"]) == [
        single,
        *sorted(set(images(tmp_path)) - {single}),
        "missing.png",
    ]
    assert set(on_device.EXTENSIONS) == imaging.EXTENSIONS


FINDERS = [pytest.param(find_images, id="uadx"), pytest.param(on_device.find_images, id="on the device")]


@pytest.mark.parametrize("find", FINDERS)
def test_a_folder_is_walked_once_whatever_links_lead_to_it(tmp_path, find):
    for name in ("a.png", "deep/b.png", "other/c.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.png").touch()
    links = {"self": ".", "deep/up": "..", "deep/other": "../other", "other/deep": "../deep", "far": "../elsewhere"}
    links["loop"] = "loop"
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    found = find([str(tmp_path / "in")])
    assert found == [str(tmp_path / "in" / name) for name in ("a.png", "deep/b.png", "far/d.png", "other/c.png")]


@pytest.mark.parametrize("find", FINDERS)
def test_words_that_cannot_be_looked_up_stay_in_the_list(tmp_path, closed, monkeypatch, find):
    (tmp_path / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    words = ["", "x" * 300 + ".png", str(closed(tmp_path / "closed") / "b.png"), "a.png"]
    assert find(words) == words


@pytest.mark.parametrize("find", FINDERS)
def test_a_folder_that_cannot_be_listed_hides_no_other(tmp_path, closed, find):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").touch()
    lost, alone = closed(tmp_path / "a" / "lost+found"), closed(tmp_path / "alone")
    assert find([str(tmp_path / "a")]) == [str(tmp_path / "a" / "b.png")]
    # The one that was asked for stands for itself.
    assert find([str(lost), str(alone)]) == [str(lost), str(alone)]


@pytest.mark.parametrize("threshold", [None, 0.0, -1.0, 0.3, 2.0])
def test_heat_maps_are_those_of_uadx(threshold):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (50, 70, 3)).astype(np.uint8))
    anomaly_map = rng.random((12, 16)).astype(np.float32)
    theirs = overlays.overlay(image, anomaly_map, float("nan") if threshold is None else threshold)
    np.testing.assert_array_equal(np.asarray(device_overlay.overlay(image, anomaly_map, threshold)), np.asarray(theirs))


@pytest.mark.parametrize("module", [overlays, device_overlay])
def test_a_heat_map_takes_little_memory_and_strips_do_not_show(module, monkeypatch):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (1500, 1000, 3)).astype(np.uint8))
    anomaly_map = rng.random((32, 32)).astype(np.float32)
    tracemalloc.start()
    try:
        found = module.overlay(image, anomaly_map, 0.5)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 20 * image.width * image.height
    monkeypatch.setattr(module, "STRIP", 1 << 30)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(module.overlay(image, anomaly_map, 0.5)))


def test_heat_maps_are_named_as_by_uadx(tmp_path):
    files = ("a.png", "a.jpg", "a.PNG", "a_png.x", "b/a.png", "b/../a.png", "a_map.png", "b/A_MAP.png")
    paths = [str(tmp_path / name) for name in files]
    for out in (tmp_path, tmp_path / "b", tmp_path / "maps"):
        assert device_overlay.picture_names(paths, out) == picture_names(paths, ".png", out)
    assert device_overlay.picture_names([], tmp_path) == {}


def test_the_names_of_nodes_are_read_without_onnx():
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weights = numpy_helper.from_array(np.arange(4000, dtype=np.float32), "w")
    nodes = [helper.make_node("Add", ["x", "w"], ["y"], name="/add"), helper.make_node("Relu", ["y"], ["z"])]
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4000])
    model = helper.make_model(helper.make_graph(nodes, "graph", [value], [], [weights])).SerializeToString()
    assert node_names(model) == ["/add (Add)", " (Relu)"]
    assert node_names(model[:-20]) == node_names(b"\xff\xff") == node_names(b"\x0f") == node_names(b"") == []
    assert json.dumps(node_names(b"onnx")) == "[]"
