"""Steps run once, again when what went in has changed, and go on after a stop."""

import dataclasses
from pathlib import Path

import pytest
from workflow import Step, Workflow, exclusive

from megatron_ponder.errors import PonderError


class Steps:
    """Two steps, the second after the first; what ran is in `ran`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given = folder / "given.txt"
        self.given.write_text("one")
        self.ran: list[str] = []
        self.fails = False
        self.first = self._step("first", inputs=[self.given])
        self.second = self._step("second", after=[self.first])

    def _step(self, name: str, **more: object) -> Step:
        output = self.folder / f"{name}.out"

        def run() -> str:
            self.ran.append(name)
            found = output.read_text() if output.exists() else ""
            output.write_text(found + "x")
            if self.fails:
                raise KeyboardInterrupt
            return "done"

        return Step(
            name=name,
            title=name,
            estimate_s=1.0,
            settings={"a": 1},
            outputs=[output],
            run=run,
            **more,  # type: ignore[arg-type]
        )

    def run(self) -> list[str]:
        (self.folder / "stamps").mkdir(exist_ok=True)
        self.ran = []
        Workflow(self.folder, [self.first, self.second]).run()
        return self.ran


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    return Steps(tmp_path)


def test_done_once(steps: Steps) -> None:
    assert steps.run() == ["first", "second"]
    assert steps.run() == []


def test_other_inputs_run_everything_behind_them_again(steps: Steps) -> None:
    steps.run()
    steps.given.write_text("two")
    assert steps.run() == ["first", "second"]
    assert (steps.folder / "first.out").read_text() == "x"


def test_other_settings_run_a_step_again(steps: Steps) -> None:
    steps.run()
    steps.second = dataclasses.replace(steps.second, settings={"a": 2})
    assert steps.run() == ["second"]


def test_a_lost_output_or_a_damaged_stamp_runs_a_step_again(steps: Steps) -> None:
    steps.run()
    (steps.folder / "second.out").unlink()
    assert steps.run() == ["second"]
    (steps.folder / "stamps" / "second.json").write_text("{")
    assert steps.run() == ["second"]


def test_an_interrupted_step_finds_what_it_left(steps: Steps) -> None:
    steps.fails = True
    with pytest.raises(KeyboardInterrupt):
        steps.run()
    steps.fails = False
    assert steps.run() == ["first", "second"]
    assert (steps.folder / "first.out").read_text() == "xx"


def test_an_interrupted_step_with_other_inputs_starts_clean(steps: Steps) -> None:
    steps.fails = True
    with pytest.raises(KeyboardInterrupt):
        steps.run()
    steps.fails = False
    steps.given.write_text("two")
    steps.run()
    assert (steps.folder / "first.out").read_text() == "x"


def test_one_run_at_a_time_and_no_foreign_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with exclusive(folder), pytest.raises(PonderError, match="another run is busy"):
        with exclusive(folder, timeout_s=0.1):
            pass
    with exclusive(folder):
        pass
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(PonderError, match="not a quickstart's"), exclusive(other):
        pass
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
