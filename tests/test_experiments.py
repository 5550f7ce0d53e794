"""Recipes, the names of runs, and what a run leaves behind.

Runs are of a few images and steps: `tiny` cuts every split of the embedded benchmark down to `IMAGES` scenes.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wsss import backbones, experiments, methods
from wsss.data import DataError, scenes
from wsss.evaluation import EvalConfig, Request, evaluate
from wsss.experiments import (
    RECIPE_DATASETS,
    THRESHOLDS,
    Experiment,
    Record,
    load_records,
    load_trained,
    obtain,
    read_state,
    recipe_entries,
    recipe_table,
    run,
    run_all,
    score_plan,
    train_experiment,
    with_seeds,
)
from wsss.files import write_json
from wsss.training import TrainConfig

ROOT = Path(__file__).parents[1]
IMAGES = 4
SMALL = (("batch_size", 2), ("steps", 2), ("warmup_steps", 1), ("seg_start", 0), ("train_images", 2))
TINY = Experiment("cam", "published", "embedded", overrides=SMALL)
STEPS = (("batch_size", 2), ("steps", 2), ("warmup_steps", 1), ("train_images", 2))
SEEDS = Experiment("transcam", "published", "embedded", overrides=STEPS)
AFFINITY = Experiment("affinity", "released", "embedded", overrides=(*STEPS, ("images", 3)), source=SEEDS)
RETRAINED = Experiment("deeplab", "released", "embedded", overrides=(*STEPS, ("images", 3)), source=AFFINITY)
RECIPES = [(m, v, d) for m in methods.METHODS for v in methods.find(m).variants for d in RECIPE_DATASETS]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)  # a run switches them on for its process


@contextlib.contextmanager
def few_images():
    """The embedded benchmark with `IMAGES` scenes a split, in this process."""
    laws = dict(scenes.SPLITS)
    scenes.SPLITS.update({split: replace(law, images=IMAGES) for split, law in laws.items()})
    experiments.cached_dataset.cache_clear()
    try:
        yield
    finally:
        scenes.SPLITS.update(laws)
        experiments.cached_dataset.cache_clear()


def run_on_few_images(experiment, runs, data_root=None, progress=False):
    """`run` for a process of its own, which does not see what a test has patched."""
    with few_images():
        return run(experiment, runs, data_root, progress)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(runs folder, record) of `TINY`, trained once."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    return runs, run_on_few_images(TINY, runs)


@pytest.fixture
def committed(finished, tmp_path):
    """A results folder whose embedded records hold the finished run."""
    shutil.copytree(finished[0], tmp_path / "results" / "embedded" / "runs")
    return tmp_path / "results"


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a run was trained that should not have been")

    monkeypatch.setattr(experiments, "_run", refuse)
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", refuse)


def any_source(method, dataset="embedded"):
    """Something that `method` can build on, or None for a first stage."""
    return Experiment("cam", "published", dataset) if methods.find(method).stage else None


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("method, variant, dataset", RECIPES)
def test_every_recipe_is_whole_and_builds_its_configs(method, variant, dataset):
    entries = recipe_entries(method, variant, dataset)
    for name, entry in entries.items():
        assert set(entry) == {"value", "source"} and entry["source"].strip(), name
    experiment = Experiment(method, variant, dataset, source=any_source(method, dataset))
    assert experiment.recipe() == {name: entry["value"] for name, entry in entries.items()}
    used = set()
    for config in experiments._configs(method):
        built = experiment.config(config)
        for field in fields(config):
            value, kind = getattr(built, field.name), field.type
            expected = {int: int, float: (int, float), bool: bool, str: str}.get(kind, tuple)
            assert isinstance(value, expected), f"{field.name} = {value!r} should be {kind}"
            assert kind is bool or not isinstance(value, bool), field.name
        used |= {field.name for field in fields(config)}
    assert used - {"variant"} - set(experiments._optional(method)) <= set(entries) <= used
    assert experiment.config(TrainConfig).transform().crop == entries["crop"]["value"]
    for name in set(methods.find(method).map_names) - {"patch"}:  # patch scores have a background of their own
        assert 0 < experiment.config(EvalConfig).threshold(name) < 1


@pytest.mark.parametrize("method, variant", [(m, v) for m in methods.METHODS for v in methods.find(m).variants])
def test_the_embedded_recipes_build_their_networks(method, variant):
    built = Experiment(method, variant, "embedded", source=any_source(method)).build(5, pretrained=False)
    assert type(built) is methods.find(method)
    if isinstance(built.backbone, backbones.MultiTokenViT):
        assert built.backbone.num_class_tokens == methods.find(method).class_tokens(5)
    assert getattr(getattr(built, "config", None), "variant", variant) == variant


def test_a_method_without_released_code_has_one_variant():
    with pytest.raises(ValueError, match="variant 'released' of supervised is not one of published"):
        Experiment("supervised", "released", "embedded").recipe()
    assert "released" not in recipe_table("supervised", "embedded").columns


def test_inherited_fields_that_a_method_does_not_have_are_left_behind():
    fields_of_seco, own = (recipe_entries(m, "published", "embedded") for m in ("seco", "supervised"))
    assert "weight_lil" not in own and own["decoder_dilation"] == fields_of_seco["decoder_dilation"]


def test_an_optional_field_is_part_of_a_run_only_where_it_is_set():
    plain = Experiment("cam", "published", "embedded")
    assert "first_steps" not in plain.recipe()
    assert replace(plain, overrides=(("first_steps", 0),)).name == plain.name
    phased = replace(plain, overrides=(("first_steps", 5),))
    assert phased.recipe()["first_steps"] == 5 and phased.name != plain.name
    assert phased.config(TrainConfig).first_steps == 5


def entry(value):
    return {"value": value, "source": f"layer {value}"}


def layered(monkeypatch, **layers):
    """Lay test layers over the recipe of `cam`, where they win."""
    real = experiments._layers("cam")
    dataset = {name: real["dataset"]["voc2012"] | own for name, own in layers.pop("dataset", {}).items()}
    monkeypatch.setattr(experiments, "_layers", lambda method: real | layers | {"dataset": dataset})


def test_later_layers_win(monkeypatch):
    own = {"registers": entry(3), "variant": {"released": {"registers": entry(4)}}}
    layered(
        monkeypatch,
        base=experiments._layers("cam")["base"] | {"registers": entry(1)},
        variant={"released": {"registers": entry(2)}},
        dataset={
            "plain": {},
            "own": own,
            "child": {"like": "own", "crop": entry(16)},
            "grandchild": {"like": "child", "registers": entry(5)},
        },
    )
    found = {
        (variant, dataset): recipe_entries("cam", variant, dataset)["registers"]
        for variant in ("published", "released")
        for dataset in ("plain", "own", "child", "grandchild")
    }
    values = {key: found["value"] for key, found in found.items()}
    assert values == {
        ("published", "plain"): 1,
        ("released", "plain"): 2,
        ("published", "own"): 3,
        ("released", "own"): 4,
        ("published", "child"): 3,
        ("released", "child"): 4,
        ("published", "grandchild"): 5,
        ("released", "grandchild"): 5,
    }
    assert found["released", "own"]["source"] == "layer 4", "an entry comes whole, with its own source"
    assert recipe_entries("cam", "published", "grandchild")["crop"]["value"] == 16


def test_a_method_inherits_what_its_file_does_not_say():
    cam, more = (recipe_entries(method, "published", "embedded") for method in ("cam", "more"))
    assert more["lr"] == cam["lr"] and set(cam) < set(more)


@pytest.mark.parametrize("like", ["vocc2012", "loop"])
def test_a_dataset_like_none_is_an_error(monkeypatch, like):
    layered(monkeypatch, dataset={"loop": {"like": like}})
    with pytest.raises(ValueError, match=rf"cam.toml \[dataset.loop\]: like = '{like}' is no other recipe"):
        recipe_entries("cam", "published", "loop")


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A copy of the recipes to spoil: `recipes(old, new)` replaces a text in `cam.toml`."""
    folder = shutil.copytree(experiments.RECIPES, tmp_path / "recipes")
    monkeypatch.setattr(experiments, "RECIPES", folder)
    experiments._layers.cache_clear()

    def spoil(old, new):
        path = folder / "cam.toml"
        text, count = re.subn(old, new, path.read_text(), flags=re.MULTILINE)
        assert count, old
        path.write_text(text)
        experiments._layers.cache_clear()

    yield spoil
    experiments._layers.cache_clear()


@pytest.mark.parametrize(
    "old, new, message",
    [
        (r"^weight_ptc =", "weigth_ptc =", r"cam.toml: unknown recipe field `weigth_ptc`; did you mean `weight_ptc`\?"),
        (r"^weight_ptc =", "zzz =", r"cam.toml: unknown recipe field `zzz`; known: .*weight_ptc"),
        (r"^weight_ptc = .*", "", r"cam.toml \[embedded, published\]: missing weight_ptc"),
        (r"^weight_ptc = .*", "weight_ptc = 0.3", "cam.toml: weight_ptc needs exactly `value` and `source`, not 0.3"),
        (r"^weight_ptc = .*", "weight_ptc = { value = 0.3 }", "weight_ptc needs exactly `value` and `source`"),
        (r"^weight_ptc =", "weight_ptc", "cam.toml: this is not valid TOML: .*line"),
    ],
)
def test_a_spoilt_recipe_names_file_and_field(recipes, old, new, message):
    recipes(old, new)
    with pytest.raises(ValueError, match=message):
        Experiment("cam", "published", "embedded").recipe()


@pytest.mark.parametrize(
    "what, message",
    [
        (("oracle", "published", "embedded"), "method 'oracle' is unknown; choose one of cam, more"),
        (("cam", "printed", "embedded"), "variant 'printed' of cam is not one of published, released"),
        (("cam", "published", "cityscapes"), "cam.toml has no recipe for 'cityscapes'; it has .*embedded"),
    ],
)
def test_an_unknown_recipe_names_the_known_ones(what, message):
    with pytest.raises(ValueError, match=message):
        Experiment(*what).recipe()


def test_a_method_without_a_recipe_is_told_the_known_ones(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "oracle", methods.find("cam"))
    with pytest.raises(ValueError, match="no recipe for the method 'oracle'; known: .*apc, cam, .*more"):
        Experiment("oracle", "published", "embedded").recipe()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("weigth_ptc", 0.1, r"overrides: unknown recipe field `weigth_ptc`; did you mean `weight_ptc`\?"),
        ("steps", "many", "overrides: steps = 'many' has the wrong type; the recipe has "),
        ("steps", 2.5, "steps = 2.5 has the wrong type"),
        ("steps", True, "steps = True has the wrong type"),
        ("eval_flip", 1, "eval_flip = 1 has the wrong type; the recipe has True"),
        ("backbone", None, "backbone = None has the wrong type"),
        ("par_dilations", 4, r"par_dilations = 4 has the wrong type; the recipe has \["),
    ],
)
def test_a_wrong_override_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, overrides=((field, value),)).recipe()


def test_overrides_replace_values_and_nothing_else():
    overrides = (("lr", 1), ("map_relu", ["cam"]))
    plain, changed = (replace(TINY, overrides=o).recipe() for o in ((), overrides))
    assert {name for name in plain if plain[name] != changed[name]} == {"lr", "map_relu"}
    assert changed["lr"] == 1 and changed["map_relu"] == ["cam"]


def test_recipe_table_shows_both_variants_and_their_sources():
    table = recipe_table("more", "embedded").set_index("field")
    assert list(table.columns) == ["published", "released", "source"]
    assert set(table.index) == set(recipe_entries("more", "published", "embedded"))
    for variant in ("published", "released"):
        entries = recipe_entries("more", variant, "embedded")
        assert (table[variant] == [str(entries[name]["value"]) for name in table.index]).all()
    differing = table[table["published"] != table["released"]]
    assert len(differing) and differing["source"].str.startswith("published: ").all()


@pytest.mark.parametrize("method, variant", [("deeplab", "released"), ("supervised", "published")])
def test_recipe_table_of_a_method_with_one_variant(method, variant):
    entries, table = recipe_entries(method, variant, "embedded"), recipe_table(method, "embedded")
    expected = [[name, str(entry["value"]), entry["source"]] for name, entry in entries.items()]
    assert list(table.columns) == ["field", variant, "source"] and table.values.tolist() == expected


# ------------------------------------------------------------------------------------------------------------ names


def test_the_key_follows_the_content_and_not_the_arm():
    experiment = Experiment("more", "published", "embedded")
    lr = experiment.recipe()["head_lr_multiplier"]
    others = [
        replace(experiment, seed=1),
        replace(experiment, variant="released"),
        replace(experiment, dataset="voc2012-cpu"),
        replace(experiment, method="cam"),
        replace(experiment, overrides=(("weight_cre", 0.01),)),
        replace(experiment, overrides=(("weight_cre", 0.02),)),
    ]
    assert len({experiment.key, *(other.key for other in others)}) == 7
    assert replace(experiment, arm="w/o L_cre").key == experiment.key
    assert replace(experiment, overrides=(("head_lr_multiplier", float(lr)),)).key == experiment.key
    assert re.fullmatch("[0-9a-f]{8}", experiment.key)


def test_the_key_follows_the_tiny_weights(tmp_path, monkeypatch):
    experiment, large = Experiment("cam", "published", "embedded"), Experiment("cam", "published", "voc2012")
    before = experiment.key, large.key
    (tmp_path / "other.safetensors").write_bytes(b"other weights")
    monkeypatch.setitem(backbones.TINY_FILES, "vit_tiny_scenes", tmp_path / "other.safetensors")
    assert experiment.key != before[0] and large.key == before[1]


def test_the_name_tells_the_run():
    experiment = Experiment("more", "published", "embedded", 3, "full", (("steps", 200), ("batch_size", 16)))
    assert experiment.name == f"more.published_vit_tiny_scenes_80_b16-200_embedded_s3-{experiment.key}"


def test_committed_records_keep_their_names():
    """No change of the library may give a run another name: its record would be lost."""
    folders = [path.parent for path in (ROOT / "results").glob("*/runs/*/record.json")]
    assert len(folders) > 100
    names = {folder.name: Record.read(folder).experiment(folder.parent).name for folder in folders}
    assert [folder for folder, name in names.items() if name != folder] == []


def test_a_later_stage_has_the_name_of_its_content_and_of_its_source():
    assert [e.method for e in RETRAINED.chain()] == ["affinity", "transcam"] and SEEDS.chain() == []
    others = [
        replace(RETRAINED, source=replace(AFFINITY, seed=1)),
        replace(RETRAINED, source=replace(AFFINITY, source=replace(SEEDS, seed=1))),
        replace(RETRAINED, source=replace(AFFINITY, source=replace(SEEDS, overrides=(*STEPS, ("noise", 2.0))))),
        replace(RETRAINED, source=SEEDS),
        replace(RETRAINED, source=replace(TINY, method="more", overrides=())),
    ]
    assert len({RETRAINED.key, *(other.key for other in others)}) == 6
    renamed = replace(RETRAINED, source=replace(AFFINITY, arm="PSA", source=replace(SEEDS, arm="BNR")))
    assert renamed.key == RETRAINED.key


def test_seeds_are_those_of_the_whole_chain():
    for seed, experiment in enumerate(with_seeds([RETRAINED], 2)):
        assert [e.seed for e in (experiment, *experiment.chain())] == [seed] * 3
    assert with_seeds([RETRAINED], 1) == [RETRAINED] and len({e.name for e in with_seeds([RETRAINED], 3)}) == 3


@pytest.mark.parametrize(
    "method, source, message",
    [
        ("affinity", None, "affinity learns from another run: name it as `source`"),
        ("deeplab", None, "deeplab learns from another run: name it as `source`"),
        ("cam", SEEDS, "cam is a first stage: leave `source` out"),
        ("affinity", AFFINITY, "affinity needs a method with maps as its source, not affinity"),
        ("affinity", RETRAINED, "affinity needs a method with maps as its source, not deeplab"),
        ("deeplab", RETRAINED, "deeplab needs a method with maps, or an affinity network, as its source, not deeplab"),
        ("deeplab", Experiment("supervised", "published", "embedded"), "as its source, not supervised"),
    ],
)
def test_a_stage_needs_the_right_source(method, source, message):
    with pytest.raises(ValueError, match=f"Experiment: .*{message}"):
        Experiment(method, "released", "embedded", source=source)


def test_seeds_vary_fastest():
    names = [(e.arm, e.seed) for e in with_seeds([TINY, replace(TINY, arm="other")], 2)]
    assert names == [("full", 0), ("full", 1), ("other", 0), ("other", 1)]


@pytest.mark.parametrize("dataset, split, side, images", [("voc2012", "val", 28, None), ("embedded", "train", 10, 7)])
def test_what_scores_are_worth_is_measured_on_what_is_scored(monkeypatch, dataset, split, side, images):
    asked = []
    monkeypatch.setattr(experiments, "cached_dataset", lambda *names: names)
    monkeypatch.setattr(experiments, "floors", lambda *arguments: asked.append(arguments) or {})
    monkeypatch.setattr(experiments, "sentence", lambda found: f"floors: {found}")
    experiment = Experiment("cam", "published", dataset, overrides=(("train_images", 7),))
    assert experiments.worth(experiment, split) == "floors: {}"
    assert asked == [((dataset, split, None), (side, side), images)]


# ------------------------------------------------------------------------------------------------------------- runs


def test_a_run_leaves_its_record(finished):
    runs, record = finished
    folder = runs / TINY.name
    assert {path.name for path in folder.iterdir()} == {"record.json", "state.json", "checkpoint.pt", ".lock"}
    assert json.loads((folder / "state.json").read_text()) == {"state": "done"}
    assert asdict(Record.read(folder)) == asdict(record) == json.loads((folder / "record.json").read_text())
    assert (record.name, record.key, record.arm, record.seed) == (TINY.name, TINY.key, "full", 0)
    assert (record.dataset, record.identity, record.classes) == ("embedded", "embedded", list(scenes.SCENE_CLASSES))
    assert record.recipe == TINY.recipe()
    assert [point["step"] for point in record.history] == [1, 2] and {"cls", "ptc", "seg"} <= set(record.history[0])
    assert set(record.metrics) == {
        "train/maps-given-labels/cam",
        "train/maps-given-labels/cam_aux",
        "train/maps-given-labels/cam+crf",
        "test/decoder/decoder",
        "test/maps-predicted-labels/cam",
        "test_broken/decoder/decoder",
    }
    for key, scores in record.metrics.items():
        assert 0 <= scores["miou"] <= 1 and len(scores["iou"]) == 11, key
        assert all(type(flag) is bool for flag in scores["present"])
    assert record.tokens == {}, "one class token for all classes has nothing to tell"
    assert record.wall_seconds > 0 and record.peak_memory_mb > 100
    assert record.environment["threads"] == 1 and {"torch", "python", "commit", "machine"} <= set(record.environment)


def test_numbers_that_are_undefined_are_null_in_the_file(finished):
    text = (finished[0] / TINY.name / "record.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and "null" in text


def test_a_second_call_reads_and_does_not_train(finished, no_training):
    runs, record = finished
    before = contents(runs)
    again = run(replace(TINY, arm="w/o L_mct"), runs, progress=False)
    assert asdict(again) == asdict(record) | {"arm": "w/o L_mct"}, "two tables may call one run by different names"
    assert [r.arm for r in run_all([TINY, replace(TINY, arm="b")], runs, progress=False)] == ["full", "b"]
    assert contents(runs) == before


def test_a_killed_run_is_done_anew_with_the_same_numbers(finished, tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    folder = tmp_path / TINY.name
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"state": "running", "pid": int(dead.stdout)}))
    assert read_state(folder)["state"] == "killed"
    with pytest.raises(FileNotFoundError, match="this run is killed, not done"):
        Record.read(folder)
    record = run_on_few_images(TINY, tmp_path)
    assert read_state(folder)["state"] == "done"
    assert (record.metrics, record.history) == (finished[1].metrics, finished[1].history)


def test_a_full_disk_ends_a_run_by_name_and_nothing_is_lost(finished, tmp_path, monkeypatch):
    folder, written = tmp_path / TINY.name, []

    def replace(temporary, path, plain=os.replace):
        if written and written[-1].endswith("checkpoint.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(str(path))
        plain(temporary, path)

    monkeypatch.setattr(os, "replace", replace)
    message = rf"{folder}/\w+.json: cannot be written \(No space left on device\).*free space and go on"
    with pytest.raises(OSError, match=message):
        run_on_few_images(TINY, tmp_path)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="not done"):
        Record.read(folder)
    assert {path.name for path in folder.iterdir()} == {"state.json", "checkpoint.pt", ".lock"}
    record = run_on_few_images(TINY, tmp_path)
    assert (record.metrics, record.history) == (finished[1].metrics, finished[1].history)


def test_the_checkpoint_of_another_method_is_refused_and_kept(finished, tmp_path):
    other = replace(TINY, method="more")
    content = (finished[0] / TINY.name / "checkpoint.pt").read_bytes()
    (tmp_path / other.name).mkdir()
    (tmp_path / other.name / "checkpoint.pt").write_bytes(content)
    message = f"checkpoint.pt: this checkpoint is of the run '{TINY.name}', not of '{other.name}'; .*remove the file"
    with pytest.raises(ValueError, match=message):
        run_on_few_images(other, tmp_path)
    assert (tmp_path / other.name / "checkpoint.pt").read_bytes() == content


def test_at_the_papers_scale_the_crf_has_all_cores():
    assert experiments._crf_workers(TINY) == 1, "small runs stand side by side"
    assert experiments._crf_workers(Experiment("cam", "published", "voc2012")) is None


def test_more_describes_its_tokens(tmp_path):
    more = Experiment("more", "published", "embedded", overrides=SMALL + (("cre_start", 0), ("ure_start", 0)))
    record = run_on_few_images(more, tmp_path)
    assert set(record.tokens) == {"silhouette", "patch_similarity", "tsne", "classes"}
    assert {"train/maps-given-labels/fused", "test/maps-predicted-labels/lam"} <= set(record.metrics)
    assert {"cre", "mct"} <= set(record.history[0])


@pytest.mark.parametrize("error", [FloatingPointError("the loss is nan"), KeyboardInterrupt()])
def test_a_failing_run_says_so_with_its_error(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        assert read_state(tmp_path / TINY.name) == {"state": "running", "pid": os.getpid()}
        raise error

    monkeypatch.setattr(experiments, "_run", fail)
    with pytest.raises(type(error)):
        run(TINY, tmp_path, progress=False)
    assert read_state(tmp_path / TINY.name) == {"state": "failed", "error": f"{type(error).__name__}: {error}"}
    with pytest.raises(FileNotFoundError, match=f"{TINY.name}: this run is failed, not done"):
        load_records([TINY], tmp_path)


def test_a_missing_record_says_how_to_get_it(finished, tmp_path):
    assert read_state(tmp_path / TINY.name) == {"state": "absent"}
    message = f"{tmp_path}/{TINY.name}: this run is absent, not done. Train it with `make reproduce`.*`retrain = True`"
    with pytest.raises(FileNotFoundError, match=message):
        load_records([TINY], tmp_path)
    assert [r.arm for r in load_records([replace(TINY, arm="x"), TINY], finished[0])] == ["x", "full"]


def test_a_runs_folder_that_cannot_be_written_is_named(tmp_path, no_training):
    (tmp_path / "file").write_text("not a folder")  # denies even the superuser
    with pytest.raises(PermissionError, match=f"{tmp_path}/file/runs/{TINY.name}: cannot write.*choose another `out`"):
        run(TINY, tmp_path / "file" / "runs", progress=False)


def test_a_dataset_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/nowhere"):
        run(Experiment("cam", "published", "coco2014"), tmp_path, str(tmp_path / "nowhere"), progress=False)


def test_run_all_finishes_the_others_before_it_reports_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "run", run_on_few_images)  # the workers find it by its name
    bad = replace(TINY, overrides=SMALL + (("backbone", "vit_of_nowhere"),))
    with pytest.raises(RuntimeError, match=f"runs failed:\n{bad.name}: RuntimeError: .*vit_of_nowhere") as failure:
        run_all([bad, TINY], tmp_path, progress=False)
    assert TINY.name not in str(failure.value)
    assert read_state(tmp_path / bad.name)["state"] == "failed"
    assert read_state(tmp_path / TINY.name)["state"] == "done"
    [record] = run_all([TINY], tmp_path, progress=False)
    assert record.environment["threads"] == 1


# ----------------------------------------------------------------------------------------------------------- stages


class InThisProcess:
    """Stands for the pool of processes, which would not see what a test has patched."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(runs folder, record of the last stage): three stages, of which only the last was asked for."""
    runs = tmp_path_factory.mktemp("chain") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "ProcessPoolExecutor", InThisProcess)
        with few_images():
            [record] = run_all([RETRAINED], runs, progress=False)
    return runs, record


def test_a_stage_trains_its_sources_and_is_scored_by_its_own_protocol(chain):
    runs, record = chain
    assert {path.name for path in runs.iterdir()} == {SEEDS.name, AFFINITY.name, RETRAINED.name}
    seeds, affinity, again = load_records([SEEDS, AFFINITY, RETRAINED], runs)
    assert asdict(again) == asdict(record)
    assert (seeds.source, affinity.source, record.source) == ("", SEEDS.name, AFFINITY.name)
    assert set(seeds.metrics) == {
        "train/maps-given-labels/transcam",
        "train/maps-given-labels/cam",
        "train/maps-given-labels/transcam+crf",
        "test/maps-predicted-labels/transcam",
    }
    assert set(affinity.metrics) == {"train/maps-given-labels/walk", "train/maps-given-labels/walk+crf"}
    assert set(record.metrics) == {
        "test/retrained/decoder",
        "test/retrained/decoder+crf",
        "test_broken/retrained/decoder",
    }
    for trained, terms in ((seeds, {"cls", "refined"}), (affinity, {"affinity"}), (record, {"seg"})):
        assert terms <= set(trained.history[0])


def test_a_stage_leaves_one_small_png_an_image_and_nothing_else(chain):
    """Label maps of other codes are arrays of floats, 70 to 110 MB an image."""
    usual = {"record.json", "state.json", "checkpoint.pt", ".lock"}
    with few_images():
        names = experiments.cached_dataset("embedded", "train", None).names
    for experiment, written in ((SEEDS, set()), (AFFINITY, set(names[:3])), (RETRAINED, set(names[:3]))):
        folder = chain[0] / experiment.name
        files = {path.relative_to(folder): path for path in folder.rglob("*.*")}
        pngs = {name: path for name, path in files.items() if name.parts[0] == "labels"}
        assert {str(name) for name in files if name not in pngs} == usual
        assert {str(name) for name in pngs} == {f"labels/{name}.png" for name in written}
        assert all(path.stat().st_size < 4096 for path in pngs.values())


def test_a_stage_that_was_killed_goes_on_with_the_same_labels_and_numbers(chain, tmp_path):
    """Killed while it wrote its label maps: the one that is there is kept, and the end is the same."""
    runs = shutil.copytree(chain[0], tmp_path / "runs")
    labels = runs / RETRAINED.name / "labels"
    whole = contents(labels)
    for path in (labels.parent / "state.json", labels.parent / "checkpoint.pt", *sorted(labels.iterdir())[1:]):
        path.unlink()
    [kept] = labels.iterdir()
    before = kept.stat().st_mtime_ns
    record = run_on_few_images(RETRAINED, runs)
    assert contents(labels) == whole and kept.stat().st_mtime_ns == before
    assert (record.metrics, record.history) == (chain[1].metrics, chain[1].history)


def missing(runs, state):
    """Bring the classifier's run into a state in which a later stage cannot build on it."""
    folder = runs / SEEDS.name
    if state == "absent":
        shutil.rmtree(folder)
    elif state == "done":
        (folder / "checkpoint.pt").unlink()
    else:
        write_json(folder / "state.json", {"state": state, "pid": os.getpid(), "error": "RuntimeError: no"})


@pytest.mark.parametrize(
    "state, message",
    [
        ("absent", r"absent\. Make it"),
        ("running", r"running\. Make it"),
        ("failed", r"failed\. Make it"),
        ("done", r"done, but its weights checkpoint.pt are not kept here\. Remove the folder, or .* make it"),
    ],
)
def test_a_stage_before_its_predecessor_says_which_command_makes_its_input(chain, tmp_path, state, message):
    runs = shutil.copytree(chain[0], tmp_path / "runs")
    missing(runs, state)
    message = rf"{SEEDS.name}: a later stage builds on this run \(full\), which is {message}"
    message += " with `wsss.experiments.run_all`, .* or with `wsss reproduce`"
    with pytest.raises(FileNotFoundError, match=message):
        load_trained(SEEDS, runs)
    shutil.rmtree(runs / RETRAINED.name)
    with pytest.raises(FileNotFoundError, match=f"{SEEDS.name}: a later stage builds on this run"):
        run_on_few_images(RETRAINED, runs)  # its affinity network is there, but that needs the classifier too
    assert read_state(runs / RETRAINED.name)["state"] == "failed"


def test_a_stage_needs_the_folder_of_the_runs():
    with few_images(), pytest.raises(ValueError, match="affinity learns from another run: pass `runs`"):
        train_experiment(AFFINITY, progress=False)


def test_a_trained_network_comes_back_with_its_weights_and_background_scores(chain):
    seeds = load_trained(SEEDS, chain[0])
    weights = torch.load(chain[0] / SEEDS.name / "checkpoint.pt", weights_only=True)["method"]
    assert all(torch.equal(value, weights[name]) for name, value in seeds.method.state_dict().items())
    assert not seeds.method.training and seeds.device.type in ("cpu", "cuda")
    chosen = Record.read(chain[0] / SEEDS.name).tokens["thresholds"]
    assert set(chosen) == {"cam", "transcam"}
    assert {name: seeds.config.threshold(name) for name in chosen} == chosen
    assert seeds.config == replace(SEEDS.config(EvalConfig), **{f"threshold_{name}": t for name, t in chosen.items()})


def test_background_scores_are_chosen_on_their_split_and_not_on_the_scored_ones(chain):
    record, seeds = Record.read(chain[0] / SEEDS.name), load_trained(SEEDS, chain[0])
    curves, chosen = record.tokens["curves"], record.tokens["thresholds"]
    assert set(curves) == {"val", "train"} and SEEDS.recipe()["threshold_split"] == "val"
    with few_images():
        train, val = (experiments.cached_dataset("embedded", split, None) for split in ("train", "val"))
        for name, threshold in chosen.items():
            swept = [Request("maps-given-labels", name, threshold=t) for t in (0.0, threshold, 0.99)]
            for dataset, split, images in ((val, "val", None), (train, "train", 2)):
                scores = evaluate(seeds.method, dataset, swept, seeds.config, "cpu", images, True, False)
                for request in swept:
                    on_curve = curves[split][name][THRESHOLDS.index(request.threshold)]
                    assert scores[request.key].miou == pytest.approx(on_curve, abs=1e-4), (split, request.key)
            assert curves["val"][name][THRESHOLDS.index(threshold)] == max(curves["val"][name])
            scored = record.metrics[f"train/maps-given-labels/{name}"]["miou"]
            assert scored == pytest.approx(curves["train"][name][THRESHOLDS.index(threshold)], abs=1e-4)


def test_choosing_background_scores_looks_at_nothing_that_is_scored(monkeypatch):
    """What stands on the scored images has no say: other truth there, the same thresholds."""
    asked, wanted = [], iter([0.3, 0.7])

    def look(method, dataset, requests, config, *_):
        asked.append((dataset, [request.key for request in requests], config.threshold_transcam, config.threshold_cam))
        return {}

    monkeypatch.setattr(experiments, "evaluate", look)
    monkeypatch.setattr(experiments, "cached_dataset", lambda name, split, root: split)
    monkeypatch.setattr(experiments.ThresholdSweep, "best", lambda self: (next(wanted), 0.5))
    method = SimpleNamespace(
        map_names=("transcam", "cam"), num_classes=3, stage="", describe=lambda dataset, images: {"told": dataset}
    )
    monkeypatch.setattr(experiments.ThresholdSweep, "curve", lambda self: (torch.zeros(2), None))
    _, told = experiments.score(SEEDS, method, None, torch.device("cpu"), False)
    assert asked[0] == ("val", [], 0.5, 0.5), "chosen before anything is scored"
    assert [(split, *scores) for split, _, *scores in asked[1:]] == [("train", 0.3, 0.7), ("test", 0.3, 0.7)]
    assert told["thresholds"] == {"transcam": 0.3, "cam": 0.7}


def test_a_map_without_a_background_score_of_its_own_is_not_swept(tmp_path):
    """`cam_aux` uses the score of `cam`."""
    record = run_on_few_images(replace(TINY, overrides=(*SMALL, ("threshold_split", "val"))), tmp_path)
    assert set(record.tokens["thresholds"]) == {"cam"} and set(record.tokens["curves"]["train"]) == {"cam"}
    assert "train/maps-given-labels/cam_aux" in record.metrics


@pytest.mark.parametrize("split", ["train", "train_aug"])
def test_background_scores_are_not_chosen_on_training_images(split):
    with pytest.raises(ValueError, match=f"threshold_split = '{split}': seeds are scored there"):
        replace(SEEDS, overrides=(("threshold_split", split),)).config(EvalConfig)


def test_no_map_is_scored_where_its_background_score_was_chosen():
    plan = lambda split: score_plan(replace(SEEDS, dataset="voc2012-cpu", overrides=(("threshold_split", split),)))
    keys = lambda split: [(name, [r.key for r in requests]) for name, _, requests in plan(split)]
    given = ["transcam", "cam", "transcam+crf"]
    train = ("train", [f"maps-given-labels/{name}" for name in given])
    assert keys("val") == [train]
    assert keys("") == [train, ("val", ["maps-predicted-labels/transcam"])]


EXTRA = ("test/maps-given-labels/cam", "test/maps-predicted-labels/cam+crf", "val/decoder/decoder")


def test_scores_that_a_recipe_names_are_scored_beside_the_others(tmp_path):
    asked = replace(TINY, overrides=(*SMALL, ("extra_scores", EXTRA)))
    plain = run_on_few_images(replace(TINY, overrides=SMALL), tmp_path)
    record = run_on_few_images(asked, tmp_path)
    assert set(record.metrics) == set(plain.metrics) | set(EXTRA)
    assert all(record.metrics[name] == plain.metrics[name] for name in plain.metrics)
    assert record.experiment(tmp_path).name == asked.name, "a record knows what it asked for"


def test_a_score_that_every_run_has_is_not_made_twice():
    keys = lambda e: [(split, request.key) for split, _, requests in score_plan(e) for request in requests]
    named = replace(TINY, overrides=(("extra_scores", ("test/decoder/decoder",)),))
    assert keys(named) == keys(TINY)


@pytest.mark.parametrize(
    "method, name, message",
    [
        ("cam", "test/cam", "extra_scores: 'test/cam' is not <split>/<protocol>/<map>"),
        ("cam", "test/oracle/cam", "protocol 'oracle' is not one of"),
        ("cam", "test/maps-given-labels/lam", "cam has no maps-given-labels/lam; it has cam, cam_aux, decoder/decoder"),
        ("cam", "test/retrained/decoder", "cam has no retrained/decoder; it has"),
        ("transcam", "test/decoder/decoder", "transcam has no decoder/decoder; it has transcam, cam"),
    ],
)
def test_a_score_that_does_not_exist_is_refused(method, name, message):
    with pytest.raises(ValueError, match=message):
        score_plan(Experiment(method, "published", "embedded", overrides=(("extra_scores", (name,)),)))


@pytest.fixture
def stub_runs(monkeypatch, finished):
    """Runs that only leave a record: returns the names in the order in which they were started."""
    started, record = [], finished[1]

    def leave(experiment, runs, *_, **__):
        for source in experiment.chain():
            assert read_state(runs / source.name)["state"] == "done", "sources come first"
        started.append(experiment.name)
        if "bad" in experiment.arm:
            raise FloatingPointError("the loss is nan")
        write_json(runs / experiment.name / "record.json", asdict(replace(record, name=experiment.name)))
        write_json(runs / experiment.name / "state.json", {"state": "done"})

    monkeypatch.setattr(experiments, "run", leave)
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", InThisProcess)
    return started


def test_sources_are_trained_first_and_once(stub_runs, tmp_path):
    wanted = with_seeds([RETRAINED, SEEDS, replace(RETRAINED, source=SEEDS), TINY], 2)
    records = run_all(wanted, tmp_path, progress=False)
    assert [record.name for record in records] == [e.name for e in wanted]
    assert sorted(stub_runs) == sorted({e.name for w in wanted for e in (w, *w.chain())}), "each once"
    started = len(stub_runs)
    run_all(wanted, tmp_path, progress=False)
    assert len(stub_runs) == started


def test_a_source_is_trained_only_for_what_is_missing(stub_runs, tmp_path):
    run_all([RETRAINED], tmp_path, progress=False)
    for source in RETRAINED.chain():
        shutil.rmtree(tmp_path / source.name)
    started = len(stub_runs)
    [record] = run_all([RETRAINED], tmp_path, progress=False)
    assert record.name == RETRAINED.name and len(stub_runs) == started, "the run is done, whatever it was built on"
    other = replace(RETRAINED, overrides=(*RETRAINED.overrides, ("crf_masks", False)))
    run_all([RETRAINED, other], tmp_path, progress=False)
    assert stub_runs[started:] == [SEEDS.name, AFFINITY.name, other.name]


def test_what_builds_on_a_failed_run_is_not_started_and_the_rest_is(stub_runs, tmp_path):
    bad = replace(AFFINITY, arm="bad", overrides=(*AFFINITY.overrides, ("beta", 1.0)))
    lost, fine = replace(RETRAINED, source=bad), replace(RETRAINED, seed=1)
    message = f"runs failed:\n{bad.name}: FloatingPointError: the loss is nan\n"
    with pytest.raises(RuntimeError, match=message) as failure:
        run_all([lost, fine, TINY], tmp_path, progress=False)
    assert f"{lost.name}: not started, a run that it builds on failed" in str(failure.value)
    assert lost.name not in stub_runs and {SEEDS.name, fine.name, TINY.name} <= set(stub_runs)
    assert read_state(tmp_path / fine.name)["state"] == "done"


# ----------------------------------------------------------------------------------------------------------- obtain


def test_committed_records_are_read(committed, no_training):
    before = contents(committed)
    records, others = obtain([TINY], str(committed), "", False, 1, "")
    assert [record.name for record in records] == [TINY.name] and others is None
    assert contents(committed) == before
    with pytest.raises(FileNotFoundError, match="this run is absent"):
        obtain([replace(TINY, seed=1)], str(committed), "", False, 1, "")


def test_retraining_needs_a_folder_of_its_own(committed, no_training):
    with pytest.raises(ValueError, match="`retrain = True` needs `out`"):
        obtain([TINY], str(committed), "", True, 1, "")


def test_retrained_runs_stand_beside_the_committed_ones(committed, tmp_path, monkeypatch):
    asked = []

    def in_this_process(wanted, runs, workers, data_root):
        asked.append((runs, workers, data_root))
        return [run_on_few_images(experiment, runs) for experiment in wanted]

    monkeypatch.setattr(experiments, "run_all", in_this_process)
    record_file = committed / "embedded" / "runs" / TINY.name / "record.json"
    edited = json.loads(record_file.read_text()) | {"wall_seconds": 12345.0}
    record_file.write_text(json.dumps(edited))
    before = contents(committed)
    records, others = obtain([TINY], str(committed), str(tmp_path / "out"), True, 2, "")
    assert asked == [(tmp_path / "out" / "runs", 2, None)]
    assert read_state(tmp_path / "out" / "runs" / TINY.name)["state"] == "done"
    assert others[0].wall_seconds == 12345.0 != records[0].wall_seconds and records[0].metrics == others[0].metrics
    assert contents(committed) == before, "committed records are never written"


@pytest.mark.parametrize("retrain", [False, True])
@pytest.mark.parametrize("out", ["", "out"])
def test_photographs_are_trained_where_they_belong(tmp_path, monkeypatch, retrain, out):
    asked = []
    monkeypatch.setattr(experiments, "run_all", lambda *arguments: asked.append(arguments) or ["records"])
    subset = SimpleNamespace(identity="voc2012-animals")
    monkeypatch.setattr(experiments, "cached_dataset", lambda name, split, root: subset if root == "voc" else None)
    wanted = [Experiment("cam", "published", "voc2012-cpu")]
    folder = str(tmp_path / out) if out else ""
    records, others = obtain(wanted, str(tmp_path / "results"), folder, retrain, 1, "voc")
    runs = tmp_path / "out" / "runs" if out else tmp_path / "results" / "voc2012-animals" / "runs"
    assert asked == [(wanted, runs, 1, "voc")]
    assert (records, others) == (["records"], None)
