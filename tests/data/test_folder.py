import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from wsss.data import DataError, load_dataset
from wsss.data.folder import Folder, build, check
from wsss.data.reading import encode_mask

HEIGHT, WIDTH = 6, 8
TABLE = "image_id,split,classes\n1,train,dog; hot dog\nsub/2,train,dog\n3,val,hot dog;\n4,val,\n"


@pytest.fixture
def root(tmp_path):
    """Four images, one in a sub-folder, with labels; masks of val."""
    root = tmp_path / "mine"
    rng = np.random.default_rng(0)
    for name in ("1.jpg", "sub/2.png", "3.JPEG", "4.jpg"):
        file = root / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(file)
    (root / "image_labels.csv").write_text(TABLE)
    (root / "classes.txt").write_text("hot dog\ndog\n")
    (root / "masks").mkdir()
    for name, value in (("3", 1), ("4", 255)):
        (root / "masks" / f"{name}.png").write_bytes(encode_mask(np.full((HEIGHT, WIDTH), value, np.uint8)))
    return root


def test_attributes_and_samples(root):
    data = load_dataset("folder", "train", root)
    assert isinstance(data, Folder) and (data.identity, data.split) == ("mine", "train")
    assert data.names == ["1", "sub/2"] and data.classes == ("hot dog", "dog")
    assert torch.equal(data.labels, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert [sample.mask for sample in data] == [None, None], "a split without masks is fine"
    sample = pickle.loads(pickle.dumps(Folder(root, "val")))[0]
    assert sample.name == "3" and sample.image.shape == (3, HEIGHT, WIDTH) and sample.mask.unique().tolist() == [1]
    assert torch.equal(Folder(root, "val").labels, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_a_folder_never_takes_the_name_of_a_dataset(root):
    assert Folder(root.rename(root.with_name("voc2012")), "val").identity == "voc2012-subset"


def test_root_is_needed():
    with pytest.raises(ValueError, match="folder of your images"):
        load_dataset("folder", "train")


def test_damaged_images_are_left_out_when_asked(root):
    (root / "images" / "1.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match="images/1.jpg"):
        data = load_dataset("folder", "train", root, skip_unreadable=True)
    assert data.names == ["sub/2"] and data.identity == "mine-subset"


# ---------------------------------------------------------------------------------------------------------- building


def by_class(root):
    """Move the images into folders named after a class; remove both text files."""
    moved = {"1.jpg": "hot dog/1.jpg", "sub/2.png": "cat/2.png", "3.JPEG": "cat/3.jpg", "4.jpg": "ant/4.jpg"}
    for source, target in moved.items():
        (root / "images" / target).parent.mkdir(exist_ok=True)
        (root / "images" / source).rename(root / "images" / target)
    (root / "image_labels.csv").unlink()
    (root / "classes.txt").unlink()


def test_labels_from_sub_folders(root):
    by_class(root)
    lines = build(root)
    assert "4 images, all of them in split train" in lines[0] and "3 classes" in lines[1]
    data = Folder(root, "train")
    assert data.classes == ("ant", "cat", "hot dog")
    shown = {name: [data.classes[i] for i in label.nonzero()[:, 0]] for name, label in zip(data.names, data.labels)}
    assert shown == {"ant/4": ["ant"], "cat/2": ["cat"], "cat/3": ["cat"], "hot dog/1": ["hot dog"]}


def test_building_again_changes_nothing_and_adds_what_is_missing(root):
    before = (root / "image_labels.csv").read_bytes()
    assert build(root) == []
    (root / "classes.txt").unlink()
    assert len(build(root)) == 1 and (root / "classes.txt").read_text() == "dog\nhot dog\n"
    assert (root / "image_labels.csv").read_bytes() == before


def test_labels_that_nobody_knows(root):
    (root / "image_labels.csv").unlink()
    with pytest.raises(DataError, match=r"images/1.jpg: lies in no sub-folder.*\(3 images\).*image_labels.csv"):
        build(root)
    (root / "image_labels.csv").write_text("image_id,split,classes\n1,train,\n")
    (root / "classes.txt").unlink()
    with pytest.raises(DataError, match="column classes: names no class"):
        build(root)


def test_a_read_only_folder_is_named(root):
    (root / "classes.txt").unlink()
    (root / "classes.txt").mkdir()  # denies even the superuser
    with pytest.raises(OSError, match="classes.txt"):
        build(root)
    assert (root / "image_labels.csv").read_text() == TABLE


# ------------------------------------------------------------------------------------------------------------- errors


def fails(root, split, words, error=DataError):
    with pytest.raises(error, match=words):
        list(Folder(root, split))


def test_missing_files(root):
    fails(root, "test", "'test'; choose one of train, val", ValueError)
    (root / "images" / "1.jpg").unlink()
    fails(root, "train", "line 2, column image_id: there is no image .*images/1")
    (root / "masks" / "3.png").unlink()
    fails(root, "val", "masks/3.png: missing, though other images of split val have a mask")
    (root / "classes.txt").unlink()
    fails(root, "val", "classes.txt: missing.*wsss data labels")
    (root / "image_labels.csv").unlink()
    fails(root, "val", "image_labels.csv: missing.*wsss data labels")


def test_no_images(tmp_path):
    with pytest.raises(DataError, match="images: there is no image"):
        build(tmp_path)


def test_two_images_of_one_name(root):
    (root / "images" / "1.png").write_bytes(b"")
    fails(root, "train", "1.png: 1.jpg has the same name but for the suffix")


def test_bad_masks(root):
    (root / "masks" / "3.png").write_bytes(encode_mask(np.full((HEIGHT, WIDTH), 3, np.uint8)))
    fails(root, "val", r"3.png: mask value 3 is neither a class \(0..2\)")
    (root / "masks" / "3.png").write_bytes(encode_mask(np.zeros((2, 2), np.uint8)))
    fails(root, "val", "3.png: the mask is 2x2 pixels")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (TABLE.replace("sub/2,train,dog", "sub/2,train,cat"), "line 3, column classes: unknown class 'cat'"),
        (TABLE + "1,val,dog\n", "line 6: 1 is listed twice"),
        (TABLE.replace("split", "part"), "column split is missing"),
    ],
)
def test_bad_tables(root, table, words):
    (root / "image_labels.csv").write_text(table)
    fails(root, "train", words)


@pytest.mark.parametrize("text", ["", "dog\ndog\n", "\n".join(map(str, range(255)))])
def test_bad_class_lists(root, text):
    (root / "classes.txt").write_text(text)
    fails(root, "train", "classes.txt: holds .* names")


def test_254_classes_leave_room_for_void(root):
    names = ["dog", "hot dog", *map(str, range(252))]
    (root / "classes.txt").write_text("\n".join(names))
    assert Folder(root, "train").labels.shape == (2, 254)


# ----------------------------------------------------------------------------------------------------------- checking


def test_check(root):
    seen = []
    report = check(root, progress=lambda items: seen.extend(items) or items)
    assert report.problems == () and len(seen) == 4 and report.folders == {"images": 4, "masks": 2}
    assert {split: found.class_counts for split, found in report.splits.items()} == {"train": (1, 2), "val": (1, 0)}
    assert "nothing is wrong" in str(report) and "officially" not in str(report) and "hot dog" in str(report)


def test_check_tells_everything_that_is_wrong(root):
    (root / "images" / "1.jpg").write_bytes(b"")
    (root / "images" / "5.jpg").write_bytes(b"")
    (root / "masks" / "6.png").write_bytes(b"")
    (root / "image_labels.csv").write_text(TABLE + "7,val,dog\n8,val,\n")
    report = check(root)
    kinds = sorted(problem.kind for problem in report.problems)
    assert kinds == ["missing", "missing", "surplus", "surplus", "unreadable"]
    (root / "image_labels.csv").write_text(TABLE.replace("sub/2,train,dog", "sub/2,train,cat"))
    assert "unknown class 'cat'" in str(check(root))
    (root / "image_labels.csv").write_text(TABLE + "1,val,dog\n")
    assert [problem.kind for problem in check(root).problems].count("list") == 1
