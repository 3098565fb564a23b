"""What is published: a source distribution and a wheel with everything in them that is needed, and nothing else. No network."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
JUNK = ("__pycache__", "*.egg-info", ".venv", ".git", "site", "runs", "build", "dist")


def build(kind, tree, folder):
    """The file that setuptools makes of a source tree."""
    command = [sys.executable, "-c", BUILD, kind, str(folder)]
    ended = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return folder / ended.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source distribution, wheel of the tree, wheel of the source distribution)"""
    folder = tmp_path_factory.mktemp("packages")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("src", "tests", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*JUNK))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    sdist = build("sdist", tree, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    for name in ("of-tree", "of-sdist"):
        (folder / name).mkdir()
    return sdist, build("wheel", tree, folder / "of-tree"), build("wheel", unpacked, folder / "of-sdist")


def sources():
    """Every file below src/, as a wheel names it."""
    return {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "lowtide").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_has_all_of_the_sources_and_nothing_else(built):
    for wheel in built[1:]:
        names = set(zipfile.ZipFile(wheel).namelist())
        own = {name for name in names if name.startswith("lowtide/")}
        assert own == sources()
        assert {"lowtide/py.typed", "lowtide/reporting/page.css", "lowtide/reporting/page.js"} <= own
        others = {name.split("/", 1)[1] for name in names - own}
        assert others == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


def test_the_source_distribution_has_what_a_build_needs_and_no_tests(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= names
    assert {f"src/{name}" for name in sources()} <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "benchmarks")) or name.endswith(".pyc")]


def test_its_description_is_whole(built):
    archive = zipfile.ZipFile(built[1])
    (name,) = (each for each in archive.namelist() if each.endswith("METADATA"))
    metadata = archive.read(name).decode()
    assert "License-Expression: Apache-2.0" in metadata and "License-File: LICENSE" in metadata
    assert (ROOT / "README.md").read_text(encoding="utf-8") in metadata
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not [line for line in needed if "matplotlib" in line or "plotly" in line or "peft" in line]


def test_what_was_installed_from_it_answers(built, tmp_path):
    """In a directory of its own, in front of the sources."""
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*command, str(built[1])], check=True, capture_output=True)
    program = (
        "import pathlib, lowtide, lowtide.cli, lowtide.reporting.page as page\n"
        f"assert pathlib.Path(lowtide.__file__).is_relative_to({str(target)!r})\n"
        "assert page._HERE.joinpath('page.css').read_text() and page._HERE.joinpath('page.js').read_text()\n"
        "raise SystemExit(lowtide.cli.main(['completion', 'bash']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    for arguments in (["-c", program], [str(target / "bin" / "lowtide"), "--version"]):
        ended = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert "lowtide" in ended.stdout
