"""Packages that are missing, do not fit, or cannot be loaded: clear lines instead of tracebacks."""

import importlib.metadata
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ponder.errors import exit_on_user_error
from megatron_ponder.installation import REQUIREMENTS, loading_error, problems

ROOT = Path(__file__).parents[2]
BARE = """
import importlib.metadata, runpy, sys
GONE = {"megatron-core", "transformers", "sentencepiece"}
sys.modules |= dict.fromkeys(["megatron", "megatron.core", "transformers", "sentencepiece"])
real = importlib.metadata.version
def version(name):
    if name in GONE:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
sys.argv = ["doctor.py"]
runpy.run_path("tools/doctor.py", run_name="__main__")
"""


def test_nothing_is_wrong_here() -> None:
    assert [*problems()] == []


@pytest.mark.parametrize(
    ("name", "version", "is_right"),
    [
        ("megatron-core", "0.13.1", False),
        ("megatron-core", "0.16.1", True),
        ("megatron-core", "0.20.0", False),
        ("transformers", "4.55.4", False),
        ("transformers", "5.0.0", True),
        ("torch", "2.6.0a0+git1", True),
        ("torch", "2.13.0+cpu", True),
    ],
)
def test_versions(name: str, version: str, is_right: bool, monkeypatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda each: version if each == name else real(each)
    )
    found = [*problems()]
    assert found == [] if is_right else f"{name} {version} does not fit: pip install" in found[0]


def test_a_library_that_cannot_be_loaded(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "transformer_engine.py").write_text("raise OSError('libcudart: not found')")
    (tmp_path / "apex.py").write_text("raise ImportError('no CUDA')")  # megatron-core forgives it
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = problems()
    assert "transformer_engine is installed, but cannot be loaded: libcudart: not found" in found
    assert isinstance(loading_error("apex"), ImportError) and loading_error("no.such") is None


def test_a_failing_import_is_explained(tmp_path: Path, monkeypatch, capsys) -> None:
    """At any command: only a failure that the installation explains loses its traceback."""

    @exit_on_user_error
    def main() -> None:
        raise ImportError("cannot import name 'X'")

    with pytest.raises(ImportError):
        main()
    (tmp_path / "transformer_engine.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert main() == 2
    assert "cannot be loaded: undefined symbol" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_doctor_reports_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "apex.py").write_text("raise OSError('libcudart: not found')")
    result = subprocess.run(
        [sys.executable, "-c", BARE],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    for part in (
        "not installed: megatron-core>=0.16.1,<0.20, sentencepiece>=0.2, transformers>=4.56.",
        "apex is installed, but cannot be loaded: libcudart: not found",
        "megatron-core: not installed",
        "`make install`",
    ):
        assert part in result.stdout, result.stdout


def test_setup_takes_its_list_from_here(monkeypatch) -> None:
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **values: given.update(values))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    assert given["install_requires"] == list(REQUIREMENTS)
