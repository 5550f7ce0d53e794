"""pyproject.toml, environment.yml and requirements.txt say the same, and no committed file names a machine."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]
CONDA_NAMES = {"opencv-python-headless": "py-opencv", "torch": "pytorch"}


def test_environment_yml_has_the_dependencies_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    conda = dict(f"{line} ".split(" ", 1) for line in environment["dependencies"])
    assert len(conda) == len(environment["dependencies"]), "no package is listed twice"
    conda = {name: SpecifierSet(bounds.strip()) for name, bounds in conda.items()}
    assert conda.pop("pip") == SpecifierSet(), "pip only installs the project itself"
    expected = {CONDA_NAMES.get(r.name, r.name): r.specifier for r in DEPENDENCIES}
    assert conda == expected | {"python": SpecifierSet(PROJECT["requires-python"])}


def pins():
    """Name -> (pinned requirements, hashes) of requirements.txt; a package may be pinned per Python version."""
    found = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / "requirements.txt").read_text().strip()):
        first, *rest = entry.split(" \\\n")
        requirement = Requirement(first.strip())
        requirements, hashes = found.setdefault(requirement.name, ([], []))
        requirements.append(requirement)
        hashes.append([line.strip() for line in rest])
    return found


def test_requirements_txt_pins_every_dependency_with_hashes():
    locked = pins()
    for dependency in DEPENDENCIES:
        assert dependency.name in locked, f"{dependency.name} is not pinned; run `make lock`"
        for pin in locked[dependency.name][0]:
            [version] = pin.specifier
            assert dependency.specifier.contains(version.version, prereleases=True), f"{pin}; run `make lock`"
    for requirements, hashes in locked.values():
        for requirement, lines in zip(requirements, hashes):
            assert [s.operator for s in requirement.specifier] == ["=="], requirement
            assert lines and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in lines), requirement


def test_requirements_txt_names_no_place():
    text = (ROOT / "requirements.txt").read_text()
    assert "://" not in text and " @ " not in text and "index" not in text and "find-links" not in text


def test_build_constraints_are_those_of_pyproject():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    assert (ROOT / "build-constraints.txt").read_text().split() == tool["build-constraint-dependencies"]


# Put together here so that this file does not contain what it looks for.
FOLDERS = ["/" + name + "/" for name in ("home", "root", "Users", "work", "tmp", "mnt", "private")]
HOSTS = [".".join(name) for name in (("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"), ("pypi", "io"))]
HOSTS += [".".join(("download", "pytorch", "org"))]
FOLDERS += [f"{folder}/" for folder in (ROOT, Path.home()) if len(folder.parts) > 1]
# A path begins where no word, dot or other slash stands before it: ../results and the paths of a URL are none.
MACHINE = re.compile(
    rf"((?<![\w./~*}})$-])|(?<=file://))({'|'.join(map(re.escape, FOLDERS))})"
    r"|(?<![\w/])[A-Za-z]:\\+(Users|Windows|Program)"
)


def configured_hosts():
    """Hosts of the package indexes that this machine is set up with."""
    urls = " ".join(value for name, value in os.environ.items() if re.match(r"(UV|PIP)_\w*INDEX", name)).split()
    return [host for host in (urlsplit(url.rpartition("=")[2]).hostname for url in urls) if host]


def committed_text():
    """(path, text) of every committed text file but the published tables; pictures in notebooks are left out."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing is committed")
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith("results/published/") or not (ROOT / name).is_file():
            continue
        content = (ROOT / name).read_bytes()
        if b"\0" not in content:
            text = content.decode()
            yield name, re.sub(r'"image/(png|jpeg)": "[^"]*"', "", text) if name.endswith(".ipynb") else text


def test_no_committed_file_names_a_machine_or_a_registry():
    host = re.compile("|".join(map(re.escape, HOSTS + configured_hosts())))
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in committed_text()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE.search(line) or host.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["see {}x", 'open("{}x")', "--out={}x", "file://{}x", "C:" + r"\Users\x"])
def test_the_search_finds_paths_of_a_machine(text):
    assert all(MACHINE.search(text.format(folder)) for folder in FOLDERS)


@pytest.mark.parametrize("text", ["..{}x", "my{}x", "$HOME{}x", "https://host{}x", "notebooks/x"])
def test_the_search_leaves_relative_paths_alone(text):
    assert not any(MACHINE.search(text.format(folder)) for folder in FOLDERS)
