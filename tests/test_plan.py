"""What a reproduction takes: the runs that are read off the notebooks, and what they cost."""

import ast
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_reproduce import without_root, write_notebook
from torch.utils.flop_counter import FlopCounterMode

from wsss import methods, plan
from wsss.cli import main
from wsss.experiments import Experiment
from wsss.plan import Asked, Clock, Cost, PlanError, asked, cost_name
from wsss.reproduce import RESULTS, find_notebooks, prepare

PARAMETERS = "dataset: str = 'embedded'  # x\nseeds: int = 2  # x\nsteps: int = 80  # x\ndata_root: str = ''  # x"
TINY = Experiment("supervised", "published", "embedded", overrides=(("batch_size", 2),))


def read(path, *cells, **parameters):
    notebook = write_notebook(path / "04_more.ipynb", *cells, parameters=PARAMETERS)
    return asked(prepare([notebook], parameters)[0])


# ------------------------------------------------------------------------------------------- the runs of a notebook


def test_what_the_notebooks_ask_for_is_what_was_run():
    tasks = prepare(find_notebooks(), {})
    runs = {run.name: run.method for task in tasks for run in asked(task).runs}
    kept = {folder.name for folder in (RESULTS / "embedded/runs").iterdir()}
    assert set(runs) == {name for name in kept if name.split(".")[0] in runs.values()}


IMPORTS = """from dataclasses import replace
from wsss import experiments, tables
from wsss.experiments import Experiment"""
ARMS = """full = Experiment("more", "published", experiments.recipe_for(dataset))
arms = [full]
changes = {"weight_cre": [0.1, 0.3]}
arms += [replace(full, arm=f"{name} = {x}", overrides=((name, x),)) for name, xs in changes.items() for x in xs]
if seeds > 1:
    arms.append(Experiment("cam", "published", full.dataset))"""
OBTAIN = "records, committed = experiments.obtain(experiments.with_seeds(arms, seeds), results, out, True, 1, '')"


def test_runs_follow_from_the_parameters_and_nothing_else_is_executed(tmp_path):
    shown = "method = experiments.train_experiment(replace(full, overrides=(('steps', steps),)), data_root)[0]"
    drawn = "name = [arm for arm in method.arms]\nmethod.draw()\n1 / 0"
    paper = "paper = tables.published('more', 3)"
    found = read(tmp_path, IMPORTS, ARMS, shown, drawn, OBTAIN, paper, seeds=3)
    assert [(run.method, run.arm, run.seed) for run in found.runs[::3]] == [
        ("more", "full", 0),
        ("more", "weight_cre = 0.1", 0),
        ("more", "weight_cre = 0.3", 0),
        ("cam", "full", 0),
    ]
    assert [run.seed for run in found.runs[:3]] == [0, 1, 2]
    assert [run.recipe()["steps"] for run in found.shown] == [80]
    assert found.tables == ["more 3"]


def test_a_plan_is_of_the_recipe_that_is_named_whatever_this_machine_can_train(tmp_path):
    assert {run.dataset for run in read(tmp_path, IMPORTS, ARMS, OBTAIN, dataset="voc2012").runs} == {"voc2012"}


def test_runs_that_others_build_on_come_first(tmp_path):
    stages = """seeds_of = Experiment("transcam", "published", dataset)
affinity = Experiment("affinity", "published", dataset, source=seeds_of)
arms = [affinity]"""
    found = read(tmp_path, IMPORTS, stages, OBTAIN, seeds=1)
    assert [run.method for run in found.runs] == ["transcam", "affinity"]


@pytest.mark.parametrize(
    "cell, reason",
    [
        (
            "trained = experiments.train_experiment(Experiment('cam', 'published', dataset))\narms = [trained[0]]",
            "depends on",
        ),
        ("for arm in (1, 2):\n    experiments.obtain(arm)", "'arm' is not defined"),
    ],
)
def test_what_cannot_be_read_off_is_refused(tmp_path, cell, reason):
    with pytest.raises(PlanError, match=f"04_more.ipynb: cannot tell what .* trains .*{reason}"):
        read(tmp_path, IMPORTS, cell, OBTAIN)


def test_a_misspelled_recipe_field_is_named_with_its_notebook(tmp_path):
    arms = "arms = [Experiment('more', 'published', dataset, overrides=(('weight_cer', 0.1),))]"
    message = "04_more.ipynb: overrides: unknown recipe field `weight_cer`; did you mean `weight_cre`"
    with pytest.raises(PlanError, match=message):
        read(tmp_path, IMPORTS, arms, OBTAIN)


@pytest.mark.parametrize(
    "code, changed, used",
    [
        ("a = [b for b in c]", {"a"}, {"c"}),
        ("a.append(b)", {"a"}, {"b"}),
        ("a[b] = c", {"a"}, {"b", "c"}),
        ("a += b", {"a"}, {"b"}),
        ("f = lambda x: x + a", {"f"}, {"a"}),
        ("import a.b as c, d.e", {"c", "d"}, set()),
        ("for a in b:\n    c.append(a)", {"a", "c"}, {"b"}),
        ("print(a)", set(), {"a", "print"}),
    ],
)
def test_names_that_a_statement_changes_and_uses(code, changed, used):
    found = plan._names(ast.parse(code).body[0])
    assert found[0] == changed
    assert used <= found[1] <= used | changed


# ------------------------------------------------------------------------------------------------------------- costs


def test_counts_grow_with_the_batch_as_steps_do():
    with FlopCounterMode(display=False) as step:
        plan._train(TINY, 1, batch_size=4)
    counted = plan.count(replace(TINY, overrides=(("batch_size", 4),)))
    assert step.get_total_flops() == pytest.approx(counted.step, rel=0.01)
    twice = plan.count(replace(TINY, overrides=(("batch_size", 8),)))
    assert twice.step == 2 * counted.step and twice.image == counted.image
    assert 1.5 * counted.gigabytes < plan.count(replace(TINY, overrides=(("batch_size", 64),))).gigabytes


def test_a_step_is_three_times_the_forward_pass():
    counted = plan.count(TINY)
    views = 2  # an image is scored with its mirror image
    assert counted.step / 2 == pytest.approx(3 * counted.image / views, rel=0.1)


@pytest.mark.parametrize("method", ["seco", "apc", "transcam", "affinity", "deeplab"])
def test_every_method_can_be_counted(method):
    source = {"affinity": "transcam", "deeplab": "cam"}.get(method)
    source = source and Experiment(source, "published", "embedded")
    experiment = Experiment(method, methods.find(method).variants[-1], "embedded", source=source)
    counted = plan.count(experiment)
    assert counted.step > counted.image > 0 and counted.gigabytes > 0


def papers_scale():
    """What the notebooks train on VOC at the papers' scale, by the name of its costs."""
    tasks = prepare(find_notebooks(), {}, {"dataset": "voc2012"})
    runs = [run for task in tasks for found in [asked(task)] for run in (*found.runs, *found.shown)]
    return {cost_name(e): e for run in runs for e in (run, *run.chain())}


def test_counts_that_come_with_the_recipes_are_theirs_and_are_not_made_again(tmp_path, monkeypatch):
    known, scale = plan.read_costs(plan.COUNTED)["counted"], papers_scale()
    assert known and set(known) <= set(scale), "a recipe has changed: leave out what is not there any more"
    monkeypatch.setattr(plan, "count", lambda experiment: pytest.fail(f"{cost_name(experiment)} is counted anew"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clock = plan.find_clock([scale[name] for name in known], None, tmp_path / "costs.json")
    assert clock.costs == known
    for name, cost in known.items():
        recipe = scale[name].recipe()
        if recipe["backbone"].startswith("vit_base"):
            forward = 12 * 24 * (recipe["crop"] // 16) ** 2 * 768**2  # of 12 blocks of 768 channels, without attention
            passes = 1 if "trainable_blocks" in recipe else 3  # no way back through blocks that do not train
            assert cost.step > passes * forward * recipe["batch_size"] and cost.image > forward, name


def test_a_measurement_leaves_out_the_warm_up(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def train(method, data, config, seed, progress, device, workers, observe):
        for step in range(plan.STEPS):
            clock.now += 5.0 if step < plan.WARM_UP else 1.0
            observe(step + 1, method)

    def score(experiment, method, images, device):
        clock.now += 2.0 * images

    monkeypatch.setattr(plan.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(plan, "train", train)
    monkeypatch.setattr(plan, "_score", score)
    monkeypatch.setattr(plan, "count", lambda experiment: Cost(1e9, 1e9, 3.0))
    measured = plan.measure(TINY, torch.device("cpu"))
    assert measured == Cost(1.0, 2.0, 3.0)


def test_a_step_and_an_image_can_be_measured():
    measured = plan.measure(TINY, torch.device("cpu"))
    assert measured.step > 0 and measured.image > 0


def test_what_does_not_fit_is_known_not_to(monkeypatch):
    def train(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(plan, "train", train)
    assert plan.measure(TINY, torch.device("cpu")).gigabytes == float("inf")


def test_costs_are_those_of_the_whole_method_at_its_size():
    more = Experiment("more", "published", "embedded")
    arm = replace(more, seed=2, arm="w/o L_cre", overrides=(("weight_cre", 0.0), ("steps", 50)))
    assert cost_name(arm) == cost_name(more)
    sizes = (("batch_size", 16), ("crop", 96), ("map_scales", [0.5, 1.0]), ("precision", "bf16"))
    assert len({cost_name(replace(more, overrides=(size,))) for size in sizes} | {cost_name(more)}) == 5


def test_costs_are_kept_by_machine(tmp_path):
    path, found = tmp_path / "results/costs.json", []

    def find(experiment):
        found.append(experiment)
        return Cost(1.5, 0.25, float(len(found)))

    wanted = [TINY, replace(TINY, seed=1), Experiment("cam", "published", "embedded")]
    first = plan.costs(wanted, "card", find, path)
    assert len(found) == 2 and first[cost_name(TINY)] == Cost(1.5, 0.25, 1.0)
    assert plan.costs(wanted, "card", find, path) == first and len(found) == 2
    plan.costs(wanted[:1], "counted", find, path)
    kept = {name: len(own) for name, own in json.loads(path.read_text()).items()}
    assert len(found) == 3 and kept == {"card": 2, "counted": 1}


@pytest.mark.parametrize("content", ["{", "[]", '{"counted": {"a": {"stepp": 1}}}'])
def test_a_file_that_holds_no_costs_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=f"{path}: these are no costs .* remove the file"):
        plan.costs([TINY], "counted", lambda _: Cost(1, 1, 1), path)
    assert path.read_text() == content


def test_costs_in_a_read_only_folder(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(folder, 0o555)
    try:
        with without_root(), pytest.raises(PermissionError, match="costs.json: cannot write .*Make it writable"):
            plan.costs([TINY], "counted", lambda _: Cost(1, 1, 1), tmp_path / "costs.json")
    finally:
        for folder in (tmp_path, *tmp_path.parents[:2]):
            os.chmod(folder, 0o755)


# -------------------------------------------------------------------------------------------------------------- plan


def test_images_and_crfs_of_a_run():
    more = Experiment("more", "published", "voc2012")
    assert plan.passes(more) == [(more, 1464, {3: 2}), (more, 1449, {21: 1})]
    few = replace(more, overrides=(("train_images", 60), ("decoder_crf", False)))
    assert plan.passes(few) == [(few, 60, {3: 2}), (few, 1449, {})]


def test_the_label_maps_of_a_later_stage_are_made_by_the_runs_before_it():
    classifier = Experiment("cam", "published", "embedded")
    affinity = Experiment("affinity", "published", "embedded", source=classifier)
    retrained = Experiment("deeplab", "released", "embedded", source=affinity)
    made = [(e.method, images) for e, images, _ in plan.passes(affinity)]
    learnt = affinity.recipe().get("images") or 2000
    walked = affinity.recipe()["train_images"] or 2000
    assert made[-3:] == [("cam", learnt), ("affinity", walked), ("cam", walked)]
    made = [(e.method, images) for e, images, _ in plan.passes(retrained)]
    learnt = retrained.recipe().get("images") or 2000
    assert made[-2:] == [("affinity", learnt), ("cam", learnt)]


@pytest.fixture
def slow(monkeypatch):
    """A clock by which a step takes 3.6 s (a thousand are an hour) and an image 36 s; a CRF takes 1 s a class."""
    monkeypatch.setattr(plan, "crf_seconds", lambda dataset, classes, iterations: float(classes))
    every = [Experiment(m, "published", "embedded") for m in ("more", "cam")]
    large = replace(every[0], overrides=(("batch_size", 99),))
    costs = {cost_name(e): Cost(3.6, 36.0, 5.0) for e in every} | {cost_name(large): Cost(3.6, 36.0, 30.0)}
    return Clock("card", 24.0, costs, {"fp32": 1.0}, "made up")


def test_hours_of_an_arm(slow):
    more = Experiment("more", "published", "embedded", overrides=(("steps", 2000),))
    runs = [replace(more, seed=seed) for seed in range(3)]
    [row] = plan.table(runs, slow).to_dict("records")
    images = sum(images for _, images, _ in plan.passes(more))
    seconds = sum(n * classes * many for _, n, crf in plan.passes(more) for classes, many in crf.items())
    assert row["arm"] == "more, published, full" and (row["runs"], row["steps"], row["memory, GB"]) == (3, 2000, 5.0)
    assert row["training, h"] == pytest.approx(3 * 2.0)
    assert row["scoring, h"] == pytest.approx(3 * images / 100) and images > 0
    assert row["CRF, core h"] == pytest.approx(3 * seconds / 3600) and seconds > 0


def test_counted_costs_follow_the_precision(slow):
    more = Experiment("more", "published", "embedded", overrides=(("steps", 1000),))
    faster = replace(slow, rate={"fp32": 2.0, "bf16": 4.0})
    assert faster.training(more) == pytest.approx(0.5)
    half = replace(more, overrides=(*more.overrides, ("precision", "bf16")))
    assert replace(faster, costs={cost_name(half): Cost(3.6, 36.0, 5.0)}).training(half) == pytest.approx(0.25)


def test_the_text_counts_a_run_once_and_says_what_does_not_fit(slow):
    more, cam = (Experiment(m, "published", "embedded") for m in ("more", "cam"))
    large = replace(more, overrides=(("batch_size", 99), ("steps", 50)))
    said = plan.text({"04_more": Asked([more], [large], ["more 1"]), "14_more": Asked([more, cam], [], [])}, slow)
    first, second, all_, large, origin = said.split("\n\n")
    assert first.startswith("04_more: more 1\n") and "runs: 1, " in first
    assert "for its pictures: more, published, 50 steps at a batch of 99: 3.0 min, 30.0 GB" in first
    assert "cam, published, full" in second and "more, published" not in second and "counted with 04_more: 1" in second
    assert all_.startswith("all notebooks: runs: 2, hours on card: ") and "GB at most: 5.0" in all_
    assert large == "More memory than card has: more at a batch of 99."
    assert origin == "Costs: made up."


def test_costs_are_counted_where_the_gpu_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "COUNTED", tmp_path / "nothing.json")
    monkeypatch.setattr(plan, "count", lambda experiment: Cost(2e12, 1e12, 3.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "costs.json"
    voc = Experiment("more", "published", "voc2012")
    clock = plan.find_clock([voc], "rtx 3090", path)
    assert clock == plan.find_clock([voc], None, path)
    assert clock.machine == plan.PAPERS_GPU == "RTX 3090"
    assert "counted, not measured" in clock.origin and "20%" in clock.origin
    assert clock.training(voc) == pytest.approx(voc.recipe()["steps"] * 2e12 / (0.2 * 35.6e12) / 3600)
    message = "--gpu GTX 9: nothing is known of it; choose one of T4, .* give this command on a"
    with pytest.raises(PlanError, match=message):
        plan.find_clock([voc], "GTX 9", path)
    costs = {"NVIDIA GTX 9": {cost_name(voc): {"step": 1.0, "image": 1.0, "gigabytes": 2.0}}}
    path.write_text(json.dumps(costs))
    clock = plan.find_clock([voc], "gtx 9", path)
    assert clock.origin == "measured on NVIDIA GTX 9 before" and clock.training(voc) == voc.recipe()["steps"] / 3600


def test_costs_are_measured_where_the_gpu_is(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "measure", lambda experiment, device: Cost(0.5, 0.1, 3.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=80 * 2**30))
    voc = Experiment("more", "published", "voc2012")
    for gpu in (None, "A100"):
        clock = plan.find_clock([voc], gpu, tmp_path / "costs.json")
        assert (clock.machine, clock.memory) == ("NVIDIA A100-SXM4-80GB", 80.0)
        assert "measured on this machine" in clock.origin
    monkeypatch.setattr(plan, "count", lambda experiment: Cost(2e12, 1e12, 3.0))
    assert plan.find_clock([voc], "V100", tmp_path / "costs.json").machine == "V100", "another one is counted"


def test_a_crf_is_timed_on_this_machine():
    assert 0 < plan.crf_seconds("embedded", 3, 1)


def test_the_command_prints_the_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    monkeypatch.setattr(plan, "measure", lambda experiment, device: Cost(0.5, 0.1, 3.0))
    monkeypatch.setattr(plan, "crf_seconds", lambda *_: 1.0)
    assert main(["plan", "--papers", "more", "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "04_more: more 1, more 2, more 5\n" in printed and "14_more_ablations: more 3, more 4\n" in printed
    assert "more, published, w/o L_cre" in printed and "counted with 04_more: 6" in printed
    assert (tmp_path / "costs.json").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpu", "GTX 9"], "--gpu GTX 9: nothing is known of it"),
        (["--dataset", "voc"], "--dataset voc is not one of embedded, voc2012"),
        (["-p", "sedes", "3"], "unknown parameter 'sedes'; did you mean seeds"),
    ],
)
def test_the_command_refuses_bad_input(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    assert main(["plan", "--notebooks", "04", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert list(Path(tmp_path).iterdir()) == []
