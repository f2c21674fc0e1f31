import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from r2vpo.job.rundir import RunDir, RunDirError, next_free, write_atomic, write_whole


def test_a_new_run_has_its_folders_and_holds_its_name(tmp_path):
    with RunDir.create(tmp_path / "runs", "a") as run:
        assert run.name == "a"
        assert sorted(entry.name for entry in run.path.iterdir()) == [
            "checkpoints",
            "control",
            "lock",
            "logs",
            "replay",
        ]
        with pytest.raises(RunDirError, match=r"name=a is occupied.*--resume.*name=…"):
            RunDir.create(tmp_path / "runs", "a")


def test_opening_needs_a_run_that_nobody_runs(tmp_path):
    with pytest.raises(RunDirError, match=r"there is no run .*; start it without --resume"):
        RunDir.open(tmp_path, "a")
    run = RunDir.create(tmp_path, "a")
    run.write_config("name: a\n")
    with pytest.raises(RunDirError, match=f"is being run by process {os.getpid()}"):
        RunDir.open(tmp_path, "a")
    run.close()
    RunDir.open(tmp_path, "a").close()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    with RunDir.create(tmp_path, "a") as run:
        run.write_config("name: a\n")
    hold = (
        "import sys, time; from pathlib import Path; from r2vpo.job.rundir import RunDir\n"
        "run = RunDir.open(Path(sys.argv[1]), 'a'); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(RunDirError, match=f"is being run by process {process.pid}"):
        RunDir.open(tmp_path, "a")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    RunDir.open(tmp_path, "a").close()


def test_the_next_free_name_follows_the_highest_number(tmp_path):
    assert next_free(tmp_path / "none", "q") == "q-1"
    for name in ("q-2", "q-10", "q", "q-x", "qq-30", "q-4.bak"):
        (tmp_path / name).mkdir()
    assert next_free(tmp_path, "q") == "q-11"


def _take_next(root: Path, count: int) -> list[str]:
    return [RunDir.create_next(root, "q").name for _ in range(count)]


def test_processes_that_race_for_the_next_name_get_different_ones(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        names = [name for taken in pool.starmap(_take_next, [(tmp_path, 10)] * 3) for name in taken]
    assert sorted(names) == sorted(f"q-{number}" for number in range(1, 31))


def test_a_name_that_cannot_be_made_is_an_error_and_not_a_loop(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(RunDirError, match="cannot make"):
        RunDir.create_next(file / "runs", "q")


def test_a_write_that_fails_leaves_the_old_content_and_no_rubbish(tmp_path):
    target = tmp_path / "summary.json"
    write_atomic(target, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(target, "new \ud800")
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_the_summary_is_json_without_nan(tmp_path):
    with RunDir.create(tmp_path, "a") as run:
        run.write_summary({"λ": 1.5})
        assert json.loads(run.summary.read_text()) == {"λ": 1.5}
        with pytest.raises(ValueError, match="not JSON compliant"):
            run.write_summary({"x": float("nan")})


def test_who_runs_a_run_is_known_without_disturbing_it(tmp_path):
    run = RunDir.create(tmp_path, "a")
    assert RunDir(tmp_path / "a").runner() == str(os.getpid())
    run.close()
    assert RunDir(tmp_path / "a").runner() is None
    assert RunDir(tmp_path / "none").runner() is None


def test_a_driver_that_starts_while_somebody_looks_at_the_lock_gets_it(tmp_path):
    with RunDir.create(tmp_path, "a") as run:
        run.write_config("name: a\n")
    look = os.open(tmp_path / "a" / "lock", os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    threading.Timer(0.15, os.close, [look]).start()
    RunDir.open(tmp_path, "a").close()


def test_commands_to_a_dead_driver_are_gone_when_the_next_one_has_the_run(tmp_path):
    with RunDir.create(tmp_path, "a") as run:
        run.write_config("name: a\n")
    (run.control / "1.request.json").write_text("{}")
    (run.control / "1.answer.json").write_text("{}")
    with RunDir.open(tmp_path, "a"):
        assert list(run.control.iterdir()) == []


def test_a_file_is_replaced_as_a_whole_and_nothing_else_is_left(tmp_path):
    for write in (write_atomic, write_whole):
        write(tmp_path / "x", "old")
        write(tmp_path / "x", "new")
        assert (tmp_path / "x").read_text() == "new"
        with pytest.raises(UnicodeEncodeError):
            write(tmp_path / "x", "\ud800")
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
        assert (tmp_path / "x").read_text() == "new"


def test_a_store_on_a_disk_of_the_node_is_found_through_the_folder_of_the_run(tmp_path):
    disk = tmp_path / "disk"
    with RunDir.create(tmp_path / "runs", "a") as run:
        placed = run.place_replay(str(disk))
        assert placed == disk / "a"
        (placed / "file").touch()
        assert (RunDir(run.path).replay / "file").exists()
        assert run.place_replay(str(disk)) == placed, "a resumed run goes on where it was"
        assert run.place_replay(None) == placed
    with RunDir.create(tmp_path / "others", "a") as other, pytest.raises(RunDirError, match="another run of that name"):
        other.place_replay(str(disk))
    disk.rename(tmp_path / "moved")
    with pytest.raises(RunDirError, match=r"replay leads to .*disk/a, which is not on this machine"):
        run.place_replay(str(disk))
    with RunDir.create(tmp_path / "runs", "plain") as plain:
        assert plain.place_replay(None) == plain.path / "replay"
