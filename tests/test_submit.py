"""From a finished run to the archive for the VOC test server, on a tiny devkit."""

import json
import tarfile

import pytest
from devkit import write_devkit

from wsss.cli import main
from wsss.experiments import Experiment, Record, run

SMALL = {
    "steps": 1,
    "batch_size": 2,
    "crop": 32,
    "eval_size": 32,
    "train_images": 1,
    "crf_bilateral": [4, 6, 3],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A devkit, and the folder of a run that was trained on it for one step."""
    root, runs = tmp_path_factory.mktemp("voc"), tmp_path_factory.mktemp("runs")
    write_devkit(root)
    experiment = Experiment("cam", "published", "voc2012-cpu", 3, "short", tuple(SMALL.items()))
    run(experiment, runs, str(root), progress=False)
    return root, runs / experiment.name, experiment


def test_a_record_knows_its_experiment(trained):
    _, folder, experiment = trained
    again = Record.read(folder).experiment(folder.parent)
    assert again.name == experiment.name and dict(again.overrides) == SMALL


@pytest.mark.parametrize("options", [[], ["--crf"]])
def test_the_archive_holds_every_test_image(trained, tmp_path, capsys, options):
    root, folder, _ = trained
    file = tmp_path / "out.tgz"
    assert main(["submit", str(folder), str(file), "--root", str(root), *options]) in (0, 1)
    said = capsys.readouterr().out
    with tarfile.open(file) as archive:
        assert [m.name for m in archive if m.isfile()] == ["results/VOC2012/Segmentation/comp6_test_cls/c1.png"]
    assert "1,456" in said or "1456" in said, "the check says that the official split is larger"


def test_a_run_without_weights_or_of_other_classes_is_refused(trained, tmp_path, capsys):
    root, folder, _ = trained
    other = tmp_path / "runs" / folder.name
    other.mkdir(parents=True)
    for name in ("record.json", "state.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    assert main(["submit", str(other), str(tmp_path / "out.tar"), "--root", str(root)]) == 1
    assert "checkpoint.pt" in capsys.readouterr().err
    (other / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes())
    record = json.loads((other / "record.json").read_text())
    (other / "record.json").write_text(json.dumps(record | {"classes": ["boat", *record["classes"][1:]]}))
    assert main(["submit", str(other), str(tmp_path / "out.tar"), "--root", str(root)]) == 1
    assert "classes" in capsys.readouterr().err and not (tmp_path / "out.tar").exists()
