import errno
import fcntl
import os
import shutil

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
    write(tmp_path, 50, state={"version": 50, "attempt": 1})
    path = write(tmp_path, 50, state={"version": 50, "attempt": 2})
    assert checkpoint.read_state(path) == {"version": 50, "attempt": 2}
    assert names(tmp_path) == ["step-000050"]


def test_a_pinned_checkpoint_outlives_its_removal_and_is_gone_afterwards(tmp_path):
    path = write(tmp_path, 50)
    (path / "deepspeed").mkdir()
    (path / "deepspeed" / "optimizer").write_text("moments")
    with checkpoint.pinned(path) as pin:
        assert (pin / "weights").samefile(path / "weights"), "links take no space"
        write(tmp_path, 60)
        checkpoint.prune(tmp_path, keep=1)
        assert not path.exists()
        assert pin.name == "step-000050"
        assert checkpoint.read_state(pin) == {"version": 50}
        assert (pin / "weights").read_text() == "weights of 50"
        assert (pin / "deepspeed" / "optimizer").read_text() == "moments"
        assert list(checkpoint.complete(tmp_path)) == [60], "a resume never begins at a pin"
    assert names(tmp_path) == ["step-000060"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_pin_goes_however_its_use_ends(tmp_path, error):
    path = write(tmp_path, 50)
    with pytest.raises(error), checkpoint.pinned(path):
        raise error
    assert names(tmp_path) == ["step-000050"]


def test_where_no_links_can_be_made_a_pin_is_a_copy(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, "another file system")

    path = write(tmp_path, 50)
    monkeypatch.setattr(os, "link", refuse)
    with checkpoint.pinned(path) as pin:
        assert not (pin / "weights").samefile(path / "weights")
        assert (pin / "weights").read_text() == "weights of 50"
        assert checkpoint.read_state(pin) == {"version": 50}


def test_where_nothing_can_be_written_beside_it_a_pin_lies_elsewhere(tmp_path, monkeypatch):
    real = checkpoint.tempfile.mkdtemp

    def elsewhere_only(*, prefix, dir=None):
        if dir is not None:
            raise PermissionError(errno.EACCES, "not yours", str(dir))
        return real(prefix=prefix, dir=tmp_path / "elsewhere")

    path = write(tmp_path / "run", 50)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(checkpoint.tempfile, "mkdtemp", elsewhere_only)
    with checkpoint.pinned(path) as pin:
        assert pin.parents[1] == tmp_path / "elsewhere"
        assert checkpoint.read_state(pin) == {"version": 50}
    assert names(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("removed_after", [0, 1, 2])
def test_a_checkpoint_that_is_removed_while_it_is_pinned_is_never_half_a_one(tmp_path, monkeypatch, removed_after):
    path = write(tmp_path, 50)
    real, calls = os.link, []

    def link(source, target):
        if len(calls) == removed_after:
            checkpoint._remove(path)
        calls.append(source)
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    removed = "step-000050 is not there, or was removed while it was read"
    with pytest.raises(ValueError, match=removed), checkpoint.pinned(path):
        pytest.fail("half a checkpoint was given out")
    assert len(calls) == removed_after + 1
    assert names(tmp_path) == []


def test_what_a_killed_process_had_pinned_goes_with_the_next_pin_and_what_is_held_stays(tmp_path):
    path = write(tmp_path, 50)
    for name in (".pinned-held", ".pinned-left"):
        shutil.copytree(path, tmp_path / name / "step-000040")
    held = os.open(tmp_path / ".pinned-held", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with checkpoint.pinned(path):
            assert not (tmp_path / ".pinned-left").exists()
        assert names(tmp_path) == [".pinned-held", "step-000050"]
    finally:
        os.close(held)


def test_the_state_of_a_checkpoint_that_is_removed_meanwhile_is_refused_as_such(tmp_path, monkeypatch):
    path = write(tmp_path, 50)
    real = checkpoint._read_object

    def remove_after_the_marker(file):
        value = real(file)
        if file.name == "COMPLETE":
            checkpoint._remove(path)
        return value

    monkeypatch.setattr(checkpoint, "_read_object", remove_after_the_marker)
    with pytest.raises(ValueError, match="step-000050 is not there, or was removed while it was read"):
        checkpoint.read_state(path)


def test_a_state_without_a_version_is_refused(tmp_path):
    checkpoint.begin(tmp_path, 50)
    path = checkpoint.commit(tmp_path, 50, {"ranks": 1})
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"trainer.json is damaged \(no version in it\)"):
        checkpoint.read_state(path)


DAMAGES = {
    "weights is damaged (it is missing)": lambda path: (path / "weights").unlink(),
    "weights is damaged (7 bytes instead of 13)": lambda path: os.truncate(path / "weights", 7),
    "trainer.json is damaged (it is missing)": lambda path: (path / "trainer.json").unlink(),
    "trainer.json is damaged (5 bytes instead of 17)": lambda path: os.truncate(path / "trainer.json", 5),
    # One digit of the 17 bytes: JSON as before, with another number in it.
    "trainer.json is damaged (other bytes": lambda path: (path / "trainer.json").write_text('{\n "version": 6\n}'),
    "COMPLETE is damaged (no JSON: Expecting": lambda path: (path / "COMPLETE").write_text("yes"),
    "COMPLETE is damaged (no JSON: 'utf-8'": lambda path: (path / "COMPLETE").write_bytes(b"\xff" * 17),
    "COMPLETE is damaged (no JSON object)": lambda path: (path / "COMPLETE").write_text("[]"),
    "COMPLETE is damaged (it does not list the files)": lambda path: (path / "COMPLETE").write_text("{}"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_to_a_complete_checkpoint_is_named_with_the_way_on(tmp_path, what):
    for step in (999_999, 1_000_000):
        checkpoint.begin(tmp_path, step)
        (checkpoint.temporary_path(tmp_path, step) / "weights").write_text("13 characters")
        path = checkpoint.commit(tmp_path, step, {"version": 5})
    assert (path / "trainer.json").stat().st_size == 17
    DAMAGES[what](path)
    with pytest.raises(checkpoint.DamagedCheckpoint) as caught:
        checkpoint.read_state(path)
    message = str(caught.value)
    assert message.startswith(f"{path}/{what}")
    assert message.endswith(f"; restore it, or remove {path} to go on from step-999999")
    shutil.rmtree(path)
    (tmp_path / "step-999999" / "weights").unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint, match="to begin without it"):
        checkpoint.read_state(tmp_path / "step-999999")


def test_checkpoints_at_multiples_stay_for_good_and_only_the_newest_count_for_a_resume(tmp_path):
    for step in range(10, 80, 10):
        write(tmp_path, step)
        checkpoint.prune(tmp_path, keep=2, keep_every=20)
    assert list(checkpoint.complete(tmp_path)) == [20, 40, 60, 70]
    assert checkpoint.resumable(tmp_path, keep=2) == {60: tmp_path / "step-000060", 70: tmp_path / "step-000070"}
    assert list(checkpoint.resumable(tmp_path, keep=9)) == [20, 40, 60, 70]


def test_a_discarded_attempt_leaves_nothing(tmp_path):
    write(tmp_path, 50)
    checkpoint.begin(tmp_path, 60)
    (checkpoint.temporary_path(tmp_path, 60) / "weights").write_text("half")
    checkpoint.discard(tmp_path, 60)
    assert names(tmp_path) == ["step-000050"]
