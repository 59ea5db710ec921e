"""``uadx predict`` on the command line."""

import json
import os
import shutil
import signal

from PIL import Image


def test_predict_takes_files_folders_and_globs(uadx, products, trained, tmp_path):
    good = products / "washer" / "test" / "good"
    first = sorted(good.iterdir())[0]
    pattern = str(products / "washer" / "test" / "c*" / "*.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    turned = tmp_path / "Ünicode name.JPG"
    Image.new("L", (90, 40), 128).save(turned)
    out_dir = tmp_path / "maps"
    status, out, _ = uadx(
        "predict", trained, first, good, pattern, tmp_path / "bad.png", turned, tmp_path / "gone.png",
        "--category", "washer",
        "--out", out_dir, "--json",
    )  # fmt: skip
    document = json.loads(out)
    rows = document["predictions"]
    assert status == 1
    assert document["errors"] == 2
    assert len(rows) == 4 + 1 + 3
    assert set(rows[0]) == {"path", "category", "score", "threshold", "verdict", "map", "error"}
    by_path = {row["path"]: row for row in rows}
    assert by_path[str(tmp_path / "bad.png")]["error"] == "not an image of a known format"
    assert by_path[str(tmp_path / "gone.png")]["error"] == "no such file"
    for row in rows:
        if row["error"] is None:
            assert row["verdict"] == ("anomalous" if row["score"] > row["threshold"] else "normal")
            with Image.open(row["path"]) as source, Image.open(row["map"]) as heat:
                assert heat.size == source.size
        else:
            assert (row["verdict"], row["score"], row["map"]) == ("error", None, None)
    assert sum(1 for _ in out_dir.rglob("*.png")) == 6
    assert (out_dir / "predictions.csv").exists()


def test_words_that_name_nothing_get_an_error_each(uadx, products, trained, tmp_path):
    image = products / "washer" / "test" / "good" / sorted(p.name for p in (products / "washer/test/good").iterdir())[0]
    status, out, err = uadx("predict", trained, "", "x" * 300 + ".png", image, "--json")
    rows = json.loads(out)["predictions"]
    assert (status, [row["error"] is None for row in rows]) == (1, [False, False, True])
    assert rows[0]["error"] == "no such file"
    assert "2 of 3 images have an error in their row" in err


def test_predict_never_overwrites_an_image(uadx, products, trained, tmp_path):
    folder = shutil.copytree(products / "washer" / "test" / "good", tmp_path / "images")
    first = sorted(folder.iterdir())[0]
    Image.open(first).save(first.with_suffix(".bmp"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    status, out, _ = uadx("predict", trained, folder, "--out", folder, "--json")
    assert status == 0
    assert {path: path.read_bytes() for path in before} == before
    maps = [row["map"] for row in json.loads(out)["predictions"]]
    assert len(set(maps)) == len(before) == 5


def test_heat_maps_of_an_earlier_call_are_no_images(uadx, products, trained, tmp_path):
    folder = shutil.copytree(products / "washer" / "test" / "good", tmp_path / "images")
    known = sorted(str(path) for path in folder.iterdir())
    for _ in range(3):
        status, out, _ = uadx("predict", trained, folder, "--out", folder, "--json")
        assert status == 0
        rows = json.loads(out)["predictions"]
        assert sorted(row["path"] for row in rows) == known
    # Asked for by its name it is one.
    (row,) = json.loads(uadx("predict", trained, rows[0]["map"], "--out", folder, "--json")[1])["predictions"]
    assert row["error"] is None


def test_maps_that_cannot_be_written_cost_no_other_image(uadx, trained, bundle, products, tmp_path, monkeypatch):
    """A name too long and a full disk: an error in the row, the others go on, and predictions.csv is there."""
    from uad_plugins.evaluation import predict

    source = sorted((products / "washer" / "test" / "good").iterdir())
    for name in (f"{'n' * 249}.png", "a.png", "b.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(source[0], tmp_path / "in" / name)
    overlay, drawn = predict.overlay, []

    class Full:
        def save(self, *_, **__):
            raise OSError(28, "No space left on device")

    def once(*arguments):
        drawn.append(arguments)
        return Full() if len(drawn) == 1 else overlay(*arguments)

    monkeypatch.setattr(predict, "overlay", once)
    status, out, err = uadx("predict", bundle, tmp_path / "in", "--out", tmp_path / "maps", "--json")
    assert status == 1, err
    assert [row["error"] for row in json.loads(out)["predictions"]] == [
        "its heat map cannot be written: No space left on device",
        None,
        "its heat map cannot be written: File name too long",
    ]
    assert len((tmp_path / "maps" / "predictions.csv").read_text().splitlines()) == 4


def test_what_was_done_before_an_interruption_is_kept(uadx, trained, bundle, products, tmp_path, monkeypatch):
    from uad_plugins.evaluation import predict

    save, saved = predict.save_overlay, []

    def breaks(picture, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(picture, path)

    monkeypatch.setattr(predict, "save_overlay", breaks)
    status, _, err = uadx("predict", bundle, products / "washer" / "test" / "good", "--out", tmp_path / "maps")
    assert status == 130
    assert err.endswith("interrupted\n")
    rows = (tmp_path / "maps" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 1 + 2
    assert sorted(saved) == sorted((tmp_path / "maps").rglob("*.png"))


def test_predict_prints_a_line_an_image(uadx, products, trained):
    image = sorted((products / "washer" / "test" / "good").iterdir())[0]
    status, out, err = uadx("predict", trained, image)
    assert status == 0
    verdict, ratio, *rest = out.split()
    assert verdict in {"normal", "anomalous"}
    assert float(ratio) > 0
    assert rest[-1] == str(image)
    assert "pooled" in err


def test_predict_watch_writes_lines_until_it_is_stopped(uadx, bundle, products, tmp_path, monkeypatch):
    from uad_plugins.evaluation import watch

    original = watch.Watch.run

    sizes = []

    def four(self, detector):
        sizes.append(self.batch_size)
        for number, row in enumerate(original(self, detector), start=1):
            yield row
            if number == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(watch.Watch, "run", four)
    images = products / "washer" / "test" / "good"
    status, out, err = uadx("predict", bundle, "--watch", images, "--out", tmp_path / "out", "--batch-size", "3")
    assert status == 0, err
    assert sizes == [3]
    assert len(out.splitlines()) == 4
    assert "stopped after 4 images" in err
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stop_while_the_detector_is_opened_ends_the_watch_cleanly(uadx, bundle, products, tmp_path, monkeypatch):
    import uad_plugins.detector

    original = uad_plugins.detector.open_detector

    def refusing(*_):
        raise AssertionError("the signal was not caught")

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setenv("UADX_CACHE", str(tmp_path / "cache"))
    zipped = shutil.make_archive(str(tmp_path / "bundle"), "zip", bundle)
    monkeypatch.setattr(uad_plugins.detector, "open_detector", stopped)
    before = signal.signal(signal.SIGTERM, refusing)
    try:
        images = products / "washer" / "test" / "good"
        status, out, err = uadx("predict", zipped, "--watch", images, "--out", tmp_path / "out")
        assert signal.getsignal(signal.SIGTERM) is refusing
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (status, out) == (0, ""), err
    assert "stopped after 0 images" in err
    # What was begun is whole.
    (unpacked,) = (tmp_path / "cache" / "bundles").iterdir()
    assert (unpacked / "bundle.json").is_file()
