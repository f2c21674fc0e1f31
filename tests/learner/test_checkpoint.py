import pytest

from learner import checkpoint


def write(directory, step, *, state=None):
    checkpoint.begin(directory, step)
    (checkpoint.temporary_path(directory, step) / "weights").write_text(f"weights of {step}")
    return checkpoint.commit(directory, step, state or {"version": step})


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_committed_checkpoint_is_found_with_its_state(tmp_path):
    path = write(tmp_path / "checkpoints", 50, state={"version": 50, "lam": 0.1})
    assert path == tmp_path / "checkpoints" / "step-000050"
    assert checkpoint.newest(tmp_path / "checkpoints") == path
    assert checkpoint.read_state(path) == {"version": 50, "lam": 0.1}
    assert (path / "weights").read_text() == "weights of 50"


def test_there_is_none_in_a_directory_that_is_empty_or_missing(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "missing") is None


def test_the_latest_step_is_the_newest_however_many_digits_it_has(tmp_path):
    for step in (999_999, 1_000_000, 7):
        write(tmp_path, step)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-1000000"


@pytest.mark.parametrize("last_call", ["begin", "state", "marker"])
def test_a_crash_while_writing_leaves_the_previous_checkpoint_the_newest(tmp_path, last_call, monkeypatch):
    previous = write(tmp_path, 50)
    calls = {"begin": 0, "state": 1, "marker": 2}[last_call]

    def crash_after(directory, left=[calls]):  # noqa: B006 - counts over calls
        if left[0] <= 1:
            raise KeyboardInterrupt
        left[0] -= 1

    checkpoint.begin(tmp_path, 60)
    if calls:
        monkeypatch.setattr(checkpoint, "flush", crash_after)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.commit(tmp_path, 60, {"version": 60})
    assert checkpoint.newest(tmp_path) == previous
    monkeypatch.undo()
    write(tmp_path, 70)
    assert names(tmp_path) == ["step-000050", "step-000070"]


def test_a_directory_without_the_marker_is_no_checkpoint(tmp_path):
    path = write(tmp_path, 50)
    (path / "COMPLETE").unlink()
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(ValueError, match="step-000050 is not a complete checkpoint"):
        checkpoint.read_state(path)


def test_other_directories_are_left_alone(tmp_path):
    (tmp_path / "step-final").mkdir()
    (tmp_path / "notes.txt").touch()
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == ["notes.txt", "step-000002", "step-000003", "step-final"]


def test_writing_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 50, state={"attempt": 1})
    path = write(tmp_path, 50, state={"attempt": 2})
    assert checkpoint.read_state(path) == {"attempt": 2}
    assert names(tmp_path) == ["step-000050"]
