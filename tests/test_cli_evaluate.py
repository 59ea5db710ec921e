"""``uadx evaluate``: what is measured, of which products, and what is kept of it."""

import csv
import json
import shutil

from PIL import Image

from uad_plugins.data.layouts import scan
from uad_plugins.evaluation.record import origin_of


def test_evaluate_reports_each_category(uadx, products, trained, tmp_path):
    status, out, err = uadx("evaluate", trained, products, "--json", "--out", tmp_path / "report")
    assert status == 0, err
    report = json.loads(out)
    assert list(report["categories"]) == ["connector", "fabric", "washer"]
    row = {"image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "aupro", "normal", "anomalous"}
    assert all(set(values) == row for values in report["categories"].values())
    assert all((values["normal"], values["anomalous"]) == (4, 4) for values in report["categories"].values())
    assert set(report["mean"]) == row - {"normal", "anomalous"}
    assert set(report["pooled"]) == row
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    with (tmp_path / "report" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert {row["verdict"] for row in rows} <= {"normal", "anomalous"}
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 12
    assert "http" not in page.replace("http-equiv", "")


def test_evaluate_prints_a_table(uadx, products, trained):
    status, out, _ = uadx("evaluate", trained, products, "--category", "fabric")
    assert status == 0
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert [line[0] for line in lines[2:]] == ["fabric", "mean", "pooled"]


def test_an_unreadable_test_image_is_left_out_and_the_exit_status_says_so(uadx, products, trained, tmp_path):
    data = shutil.copytree(products, tmp_path / "data")
    victim = sorted((data / "fabric" / "test" / "good").iterdir())[0]
    victim.write_bytes(b"")
    status, out, err = uadx("evaluate", trained, data, "--json")
    assert status == 1
    assert json.loads(out)["categories"]["fabric"]["normal"] == 3
    assert json.loads(out)["unreadable"] == {f"fabric/test/good/{victim.name}": "empty file"}
    assert err == f"warning: fabric/test/good/{victim.name}: empty file\n"


def test_a_heat_map_that_cannot_be_written_costs_no_figure(uadx, products, trained, tmp_path):
    data = shutil.copytree(products, tmp_path / "data")
    good = data / "fabric" / "test" / "good"
    victim = sorted(good.iterdir())[0].rename(good / f"{'0' * 249}.png")
    status, out, err = uadx("evaluate", trained, data, "--json", "--out", tmp_path / "report", "--all-maps")
    assert status == 1
    assert f"warning: fabric/test/good/{victim.name}: its heat map cannot be written: File name too long\n" in err
    assert json.loads(out)["categories"]["fabric"]["normal"] == 4
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == json.loads(out)
    assert len(list((tmp_path / "report" / "maps").rglob("*.jpg"))) == 23
    assert (tmp_path / "report" / "report.html").is_file()


def test_maps_need_a_folder(uadx, products, trained):
    status, _, err = uadx("evaluate", trained, products, "--all-maps")
    assert (status, err) == (2, "error: --all-maps has no folder to write to\nhint: add --out DIR\n")


def test_a_mask_of_another_size_than_its_image_does_not_count(uadx, products, trained, tmp_path):
    """Stretched it would mark another place."""
    data = shutil.copytree(products, tmp_path / "data")
    mask = next((data / "fabric" / "ground_truth").rglob("*.png"))
    Image.new("L", (48, 20), 255).save(mask)
    status, out, err = uadx("evaluate", trained, data, "--json")
    assert status == 1
    reason = "mask is 48x20, its image 64x64; its image counts, its pixels do not"
    assert json.loads(out)["unreadable"] == {str(mask.relative_to(data)): reason}
    assert json.loads(out)["categories"]["fabric"]["anomalous"] == 4
    assert reason in err


def test_an_unknown_category_is_judged_by_the_pooled_threshold(uadx, products, trained, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(products / "fabric", data / "linen")
    status, out, err = uadx("evaluate", trained, data, "--json")
    assert status == 0
    assert "'linen' was not trained on" in err
    pooled = json.loads((trained / "thresholds.json").read_text())["pooled"]["value"]
    assert json.loads(out)["decisions"]["linen"]["threshold"] == pooled


def test_products_that_were_not_trained_on_are_left_out_unless_they_are_asked_for(uadx, products, trained, tmp_path):
    run, data = (shutil.copytree(source, tmp_path / source.name) for source in (trained, products))
    shutil.copytree(data / "fabric", data / "linen")
    status, out, err = uadx("evaluate", run, data, "--json")
    assert status == 0
    report = json.loads(out)
    assert sorted(report["categories"]) == ["connector", "fabric", "washer"]
    assert "note: not trained on, and left out: linen; --category NAME measures one all the same\n" in err
    assert report["left_out"] == ["linen"]
    # What is kept for bundles is the mean over its own products.
    assert json.loads((run / "evaluation.json").read_text())["mean"] == report["mean"]
    every = [word for name in ("connector", "fabric", "linen", "washer") for word in ("--category", name)]
    status, out, err = uadx("evaluate", run, data, *every, "--json")
    assert sorted(json.loads(out)["categories"]) == ["connector", "fabric", "linen", "washer"]
    assert "'linen' was not trained on" in err
    assert json.loads((run / "evaluation.json").read_text())["mean"] == report["mean"]
    # Where no product of its own has a test image, there is nothing to leave out.
    for name in ("connector", "fabric", "washer"):
        shutil.rmtree(data / name / "test")
    status, out, err = uadx("evaluate", run, data, "--json")
    assert (status, sorted(json.loads(out)["categories"])) == (0, ["linen"])


def test_the_layout_that_was_named_for_training_is_taken_again(uadx, products, trained, tmp_path):
    run, data = shutil.copytree(trained, tmp_path / "run"), shutil.copytree(products, tmp_path / "data")
    seen = sorted((data / "fabric" / "train" / "good").iterdir())[:2]
    (data / "index.csv").write_text("".join(["path,category,split,label\n", *(f"{path},fabric,test,0\n" for path in seen)]))
    status, out, _ = uadx("evaluate", run, data, "--json")
    assert (status, json.loads(out)["pooled"]["normal"]) == (0, 2)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("layout: null", "layout: mvtec"))
    status, out, _ = uadx("evaluate", run, data, "--json")
    assert (status, json.loads(out)["pooled"]["normal"]) == (0, 12)
    status, out, _ = uadx("evaluate", run, data, "--layout", "index", "--json")
    assert (status, json.loads(out)["pooled"]["normal"]) == (0, 2)
    # What cannot have that layout has its own; a bundle knows the layout too.
    status, out, _ = uadx("evaluate", run, data / "index.csv", "--json")
    assert (status, json.loads(out)["pooled"]["normal"]) == (0, 2)
    assert origin_of(run)["layout"] == "mvtec"
    assert origin_of(tmp_path) == {}
    status, _, err = uadx("deploy", run, "--target", "onnx", "--out", tmp_path / "bundle", "--data", products)
    assert status == 0, err
    status, out, _ = uadx("evaluate", tmp_path / "bundle", data, "--json")
    assert (status, json.loads(out)["pooled"]["normal"]) == (0, 12)
    (run / "split.json").write_text("{}")
    assert origin_of(run) == {}


def test_test_images_that_were_trained_on_are_counted_and_the_figures_are_not_kept(uadx, trained, products, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "evaluation.json").unlink(missing_ok=True)
    rows = [f"{s.path},{s.category},test,{s.label}" for s in scan(products)]
    (tmp_path / "index.csv").write_text("\n".join(["path,category,split,label", *rows]))
    status, out, err = uadx("evaluate", run, tmp_path / "index.csv", "--json")
    assert (status, json.loads(out)["pooled"]["normal"]) == (0, 42)
    # Three of the thirty were held out.
    assert "warning: 27 of these test images were trained on: the figures say nothing of new ones\n" in err
    assert not (run / "evaluation.json").exists()
    assert "trained on" not in uadx("evaluate", run, products, "--json")[2]


def test_figures_of_images_that_could_not_all_be_read_are_not_kept(uadx, trained, products, tmp_path):
    run, data = shutil.copytree(trained, tmp_path / "run"), shutil.copytree(products, tmp_path / "data")
    (run / "evaluation.json").unlink(missing_ok=True)
    next((data / "washer" / "test" / "good").iterdir()).write_bytes(b"")
    assert uadx("evaluate", run, data, "--json")[0] == 1
    assert not (run / "evaluation.json").exists()


def test_a_product_without_test_images_is_named_and_the_figures_are_not_kept(uadx, trained, products, tmp_path):
    run, data = shutil.copytree(trained, tmp_path / "run"), shutil.copytree(products, tmp_path / "data")
    (run / "evaluation.json").unlink(missing_ok=True)
    shutil.rmtree(data / "washer" / "test")
    shutil.rmtree(data / "washer" / "ground_truth")
    status, out, err = uadx("evaluate", run, data, "--json")
    assert status == 0, err
    assert "warning: no test image of washer: not measured, and not in the mean" in err
    assert "washer" not in json.loads(out)["categories"]
    assert not (run / "evaluation.json").exists()
    assert uadx("evaluate", run, products, "--json")[0] == 0
    assert (run / "evaluation.json").exists()
