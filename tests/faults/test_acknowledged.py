import subprocess
import sys

from tests.faults.acknowledged import acknowledged, recording, write_record

SAY = "import logging; logging.getLogger('rollout.worker').debug('acknowledged %s', '0.17')"


def test_a_process_of_a_recorded_run_writes_what_was_acknowledged_and_no_other_does(tmp_path):
    with (tmp_path / "rollout-0.log").open("w") as log:
        subprocess.run([sys.executable, "-c", SAY], stderr=log, env=recording(tmp_path / "site"), check=True)
    assert acknowledged(tmp_path) == ["0.17"]
    said = subprocess.run([sys.executable, "-c", SAY], capture_output=True, check=True)
    assert said.stderr == b""


def test_keys_of_all_workers_are_joined_and_half_a_line_is_none(tmp_path):
    (tmp_path / "rollout-0.log").write_text("acknowledged 0.1\nother words\nacknowledged 0.2\nacknowledged 0.3")
    (tmp_path / "rollout-1.log").write_text("acknowledged 1.0\nacknowledged 0.1\nI acknowledged 7.7\n")
    (tmp_path / "learner-0.log").write_text("acknowledged 9.9\n")
    assert acknowledged(tmp_path) == ["0.1", "0.2", "1.0"]
    assert write_record(tmp_path, tmp_path / "keys").read_text() == "0.1\n0.2\n1.0\n"
