"""What is shipped: versions that agree, extras that parse, and a wheel that stands on its own."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import kvenv

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = [Requirement(text) for text in metadata.requires("kvenv") or []]
CORE = {canonicalize_name(r.name): r for r in REQUIREMENTS if "extra" not in str(r.marker)}


def pins(file: str) -> dict[str, list[Version]]:
    """Each package of a constraints file with its pinned versions (one for each marker)."""
    found: dict[str, list[Version]] = {}
    for line in (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert re.fullmatch(r"==[^,*]+", str(pin.specifier)), f"{line!r} in {file} is not a pin"
            name = canonicalize_name(pin.name)
            found.setdefault(name, []).append(Version(str(pin.specifier)[2:]))
    return found


def test_the_installed_version_is_the_package_s_own() -> None:
    assert metadata.version("kvenv") == kvenv.__version__, "run make again: kvenv's version changed"


def test_the_changelog_s_newest_entry_is_this_version_or_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[([^]]+)\]", text, flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:2] in ([], [kvenv.__version__])


def test_oldest_pins_every_core_dependency_at_its_lower_bound() -> None:
    bounds = {
        name: [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        for name, requirement in CORE.items()
    }
    assert pins("oldest.txt") == bounds


def test_the_lock_pins_every_core_dependency_inside_its_range() -> None:
    locked = pins("lock.txt")
    for name, requirement in CORE.items():
        assert locked[name], f"{name} is not in requirements/lock.txt"
        assert all(version in requirement.specifier for version in locked[name]), name


def test_extras_are_known_by_their_documented_names() -> None:
    extras = set(metadata.metadata("kvenv").get_all("Provides-Extra") or [])
    sources = {"datasets", "episodes", "kvpress", "minari"}
    assert extras == sources | {"dev", "plots", "ray", "sb3", "tensorboard", "video"}
    for extra in extras:
        assert any(r.marker and r.marker.evaluate({"extra": extra}) for r in REQUIREMENTS), extra


def test_the_console_script_is_the_command_line() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="kvenv")
    assert callable(script.load())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that the checkout builds."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    built = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("kvenv-*.whl")
    return zipfile.ZipFile(path)


def shipped(folder: str, pattern: str) -> set[str]:
    found = (ROOT / folder).rglob(pattern)
    return {path.relative_to(ROOT).as_posix() for path in found if path.is_file()}


def test_the_wheel_carries_the_package_the_plug_ins_the_sample_and_the_trained_agents(
    wheel: zipfile.ZipFile,
) -> None:
    names = set(wheel.namelist())
    code = shipped("kvenv", "*.py")
    read = [shipped("kvenv", f"*.{kind}") for kind in ("jinja", "html", "css", "js")]
    assert all(read), "kvenv holds what its code reads: a card's template and the report's page"
    plugins = shipped("agents", "*.py") | shipped("traces", "*.py")
    sample = shipped("traces/sample", "*.h5") | shipped("traces/sample", "manifest.json")
    assert plugins
    assert len(sample) >= 2, "traces/sample holds a manifest and at least one shard"
    trained = shipped("agents/trained", "*")
    data = {f"kvenv/_data/{name}" for name in plugins | sample | trained}
    assert code.union({"kvenv/py.typed"}, data, *read) <= names


def test_the_wheel_carries_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"kvenv", f"kvenv-{kvenv.__version__}.dist-info"}
    assert not [name for name in wheel.namelist() if "__pycache__" in name]
