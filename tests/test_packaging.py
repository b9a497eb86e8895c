"""What is imported is this checkout, and what is built holds the four packages and nothing else."""

from __future__ import annotations

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("diffusion_env", "agents", "rewards", "configs")


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory) -> set[str]:
    """The paths in a wheel built from this checkout, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob("diffusion_env-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_the_checkout_is_imported(package: str):
    module = importlib.import_module(package)
    assert module.__file__ is not None, f"{package}/ has no __init__.py"
    assert Path(module.__file__).resolve() == ROOT / package / "__init__.py"


def test_wheel_holds_the_four_packages_alone(wheel_files: set[str]):
    top_level = {name.split("/")[0] for name in wheel_files}
    dist_info = {name for name in top_level if name.startswith("diffusion_env-") and name.endswith(".dist-info")}
    assert len(dist_info) == 1
    assert top_level - dist_info == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_file_of_a_package(package: str, wheel_files: set[str]):
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix in {".py", ".safetensors", ".json", ".typed"}
    }
    assert {f"{package}/__init__.py", f"{package}/py.typed"} <= on_disk
    assert on_disk <= wheel_files


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE"])
def test_wheel_holds_the_licence(name: str, wheel_files: set[str]):
    assert any(path.endswith(f".dist-info/licenses/{name}") for path in wheel_files)
