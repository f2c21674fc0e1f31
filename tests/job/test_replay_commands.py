import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text

from r2vpo import cli
from r2vpo.job import replay_view
from r2vpo.job.config import ModelConfig, RunConfig, to_yaml
from r2vpo.job.replay_view import Column, printable, size_text, stats_lines, table
from r2vpo.records import TrajectoryGroup
from replay.config import ReplayConfig
from replay.reader import StoreReader, StoreStats
from replay.schema import shard_file
from tests.replay.replay_groups import make_group, make_trajectory
from tests.replay.stored_runs import StoredRun, tamper

HEAVY = {"deepspeed", "pandas", "pyarrow", "ray", "torch", "transformers", "vllm"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ``toy`` in ./runs: ids 1 to 4, of versions 0 to 3; steps 0 and 1 trained on 1, and on 2 and (stale) 1."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "toy"
    with StoredRun(folder / "replay") as stored:
        stored.append(*(make_group(index, version=index) for index in range(4)))
        stored.train(0, fresh=[1])
        stored.train(1, fresh=[2], stale=[1])
    configure(folder)
    return folder


@pytest.fixture
def said(capsys):
    """Runs a command and returns its exit code, standard output and standard error."""

    def run_command(*argv):
        code = cli.main(["replay", *argv])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run_command


def configure(run, **replay):
    config = RunConfig(name="toy", model=ModelConfig(path="model"), replay=ReplayConfig(**replay))
    (run / "config.yaml").write_text(to_yaml(config))


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["stats", "toi"], ["there is no run toi", "runs/ holds toy"]),
        (["stats", "runs/toi"], ["there is no run runs/toi", "runs/ holds toy"]),
        (["stats", "elsewhere/toy"], ["none at all in elsewhere/"]),
        (["stats", "runs"], ["runs is no run"]),
        (["frob", "toy"], ["invalid choice: 'frob'"]),
        (["show", "toy", "17"], ["has no group 17", "r2vpo replay ls toy"]),
        (["show", "toy", "0.17"], ["has no group of prompt 0.17"]),
        (["show", "toy", "0.017"], ["0.017", "malformed"]),
        (["show", "toy", "first"], ["first is neither a group's id", "nor a prompt's key"]),
        (["ls", "toy", "--state", "tired"], ["--state", "invalid choice: 'tired'"]),
        (["ls", "toy", "--version", "3:1"], ["3:1 is no range of versions"]),
        (["ls", "toy", "--limit", "-1"], ["--limit"]),
        (["ls", "toy", "more"], ["more is one argument too many"]),
        (["export", "toy"], ["--to"]),
        (["export", "toy", "--to", "runs"], ["--to runs exists", "name a file in it"]),
        (["export", "toy", "--to", "none/x.parquet"], ["there is no folder none"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_be_put_right_is_one_sentence_and_exit_code_2(run, said, argv, parts):
    result = said(*argv)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("r2vpo: error: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


def test_a_store_that_cannot_be_opened_is_exit_code_2_of_every_command(run, said):
    (run / "replay" / shard_file(0)).write_bytes(b"no database" * 1000)
    for argv in (["stats", "toy"], ["ls", "toy"], ["show", "toy", "1"], ["verify", "toy"]):
        result = said(*argv)
        assert (result.code, result.out) == (2, "")
        assert shard_file(0) in result.err


def test_a_run_is_found_by_name_and_by_folder(run, said):
    assert said("ls", "toy").out == said("ls", "runs/toy").out == said("ls", str(run)).out


def test_stats_say_the_counts_as_text_and_as_json(run, said):
    text = said("stats", "toy").out
    assert text.startswith("toy  next step 2\n")
    assert "4 of 8 trajectories, 24 sampled tokens" in text
    assert "2 fresh, 1 stale" in text
    assert "2 waiting, 2 consumed" in text
    stats = json.loads(said("stats", "toy", "--json").out)
    assert (stats["run"], stats["groups"], stats["trained"]) == ("toy", 4, {"fresh": 2, "stale": 1})
    assert stats["lags"] == {"fresh": {"0": 2}, "stale": {"1": 1}}
    assert stats["rewards"][3] == {"version": 3, "groups": 1, "verdicts": 2, "reward": 0.5}


def test_ls_lists_the_newest_and_says_how_many_more(run, said):
    lines = said("ls", "toy", "--limit", "3").out.splitlines()
    assert lines[0].split() == ["id", "key", "versions", "uses", "reward", "outcomes", "tokens", "size", "state"]
    assert [line.split()[0] for line in lines[1:4]] == ["4", "3", "2"]
    assert lines[1].endswith("waiting")
    assert lines[3].endswith("consumed at 1")
    assert lines[4:] == ["1 more; --limit 4 shows all"]
    assert said("ls", "toy", "--limit", "4").out.count("\n") == 5
    assert said("ls", "toy", "--state", "late").out == "no group\n"


def test_ls_as_json_is_one_object_per_line(run, said):
    groups = [json.loads(line) for line in said("ls", "toy", "--step", "1", "--json").out.splitlines()]
    assert [group["id"] for group in groups] == [2, 1]
    assert groups[1]["trained"] == [{"step": 0, "kind": "fresh"}, {"step": 1, "kind": "stale"}]
    assert groups[1]["uses"] == 2


def test_show_prints_a_group_for_people(run, said):
    text = said("show", "toy", "0.0").out
    assert text == said("show", "toy", "1").out
    assert text.splitlines()[0] == "group 1  prompt 0.0  consumed at 0, 1"
    assert "step 0 (fresh), step 1 (stale)" in text
    assert "trajectory 1  scored  reward 1.000  3 sampled tokens, mean log-prob -0.500, version 0 × 3" in text
    assert "position" not in text


def test_show_prints_versions_in_spans_and_every_token_when_asked(tmp_path, monkeypatch, said):
    monkeypatch.chdir(tmp_path)
    with StoredRun(tmp_path / "toy" / "replay") as stored:
        stored.append(make_group(0, version=3, newest=4))
    text = said("show", "toy", "1", "--tokens").out
    assert "version 3 × 2, 4 × 1" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("       ")][:5]
    assert rows == [
        ["0", "0", "–", "–", "–"],
        ["1", "1", "–", "–", "–"],
        ["2", "2", "-0.5000", "3", "yes"],
        ["3", "3", "-0.5000", "3", "yes"],
        ["4", "4", "-0.5000", "4", "yes"],
    ]


def test_show_as_json_has_lists_per_token_only_when_asked(run, said):
    group = json.loads(said("show", "toy", "1", "--json").out)
    assert (group["truth"], group["trajectories"][1]["reward"]) == ("42", 1.0)
    assert "token_ids" not in group["trajectories"][0]
    tokens = json.loads(said("show", "toy", "1", "--json", "--tokens").out)["trajectories"][0]
    assert tokens["token_ids"] == [0, 1, 2, 3, 4]
    assert tokens["behavior_logprob"] == [0.0, 0.0, -0.5, -0.5, -0.5]


def test_show_of_an_evicted_group_says_that_its_content_is_gone(run, said):
    with StoredRun(run / "replay") as stored:
        stored.evict(1)
    result = said("show", "toy", "1")
    assert result.code == 0
    assert result.out.startswith("group 1  prompt 0.0  evicted\n")
    assert "trajectory 0" not in result.out
    assert "evicted" in json.loads(said("show", "toy", "1", "--json").out)["problem"]


def test_a_response_cannot_steer_the_terminal(tmp_path, monkeypatch, said):
    monkeypatch.chdir(tmp_path)
    member = make_trajectory(response="red \x1b[31m\nsecond \ud800")
    with StoredRun(tmp_path / "toy" / "replay") as stored:
        stored.append(TrajectoryGroup(key="0.0", prompt="[bold]", truth="", trajectories=(member, member)))
    text = said("show", "toy", "1").out
    assert "    red \\u001b[31m\n    second \\ud800\n" in text
    assert "    [bold]\n" in text
    assert printable("a\tb\u202ec") == "a\tb\\u202ec"


def test_verify_of_a_sound_run_is_exit_code_0(run, said):
    configure(run, max_lag=0, max_replay_lag=1)
    result = said("verify", "toy")
    assert (result.code, result.out, result.err) == (0, "toy: sound\n", "")
    assert said("verify", "toy", "--quiet").out == ""


def test_verify_checks_lags_against_the_settings_of_the_run(run, said):
    with StoredRun(run / "replay") as stored:
        stored.train(2, fresh=[3], stale=[1])
    configure(run, max_lag=0, max_replay_lag=1)
    result = said("verify", "toy")
    assert result.code == 1
    assert result.out.splitlines() == [
        "step 2 trained on stale group 1 (0.0) of versions 0 to 0: lag 2 is above replay.max_replay_lag=1",
        "toy: 1 problem",
    ]
    assert said("verify", "toy", "--quiet").out.count("\n") == 1


def test_without_the_settings_of_the_run_it_is_said_what_they_would_tell(run, said):
    (run / "config.yaml").unlink()
    result = said("verify", "toy")
    assert result.code == 0
    assert "config.yaml is not there: lags are not checked" in result.err
    (run / "config.yaml").write_text("replay: [")
    result = said("verify", "toy")
    assert (result.code, ": lags are not checked" in result.err) == (0, True)
    assert "groups that replay.skip_no_signal or replay.min_verdicts leave out" in said("ls", "toy").err


def test_verify_names_a_damaged_group(run, said):
    configure(run)
    tamper(run / "replay" / shard_file(0), "UPDATE payloads SET payload = zeroblob(9) WHERE group_id = 3")
    result = said("verify", "toy")
    assert result.code == 1
    assert "group 3" in result.out.splitlines()[0]
    assert result.out.endswith("toy: 1 problem\n")


def test_what_lies_on_another_host_is_said_on_standard_error(tmp_path, monkeypatch, said):
    monkeypatch.chdir(tmp_path)
    with StoredRun(tmp_path / "toy" / "replay", shards=2) as stored:
        stored.log.set_hosts({1: "node-b"})
    (tmp_path / "toy" / "replay" / shard_file(1)).unlink()
    configure(tmp_path / "toy")
    sentence = "shard 1 of 2 is not here: shard-001.sqlite3 lies on host node-b\n"
    for argv in (["stats", "toy"], ["ls", "toy"]):
        result = said(*argv)
        assert (result.code, result.err) == (0, f"r2vpo: note: {sentence}")
    result = said("verify", "toy")
    assert (result.code, result.out) == (0, "toy: sound\n")
    assert result.err.endswith(f"r2vpo: note: not checked: {sentence}")


def test_export_writes_a_file_once(run, said):
    result = said("export", "toy", "--to", "x.parquet")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("x.parquet: 8 trajectories of 4 groups, ")
    assert "--force" in said("export", "toy", "--to", "x.parquet").err
    with StoredRun(run / "replay") as stored:
        stored.evict(1)
    result = said("export", "toy", "--to", "x.parquet", "--force", "--tokens")
    assert result.out.startswith("x.parquet: 6 trajectories of 3 groups, ")
    assert "left out 1 group whose payload is evicted" in result.out


def test_a_reader_that_leaves_is_no_error_and_nothing_heavy_is_imported(run):
    code = (
        "import sys\nfrom r2vpo.cli import main\ncode = main(sys.argv[1:])\n"
        "print(*sys.modules, file=sys.stderr)\nsys.exit(code)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as gone:
        ended = subprocess.run(
            [sys.executable, "-c", code, "replay", "stats", "toy"], stdout=gone, stderr=subprocess.PIPE, text=True
        )
    assert ended.returncode == 141
    assert "Traceback" not in ended.stderr
    assert not HEAVY & set(ended.stderr.split())


def test_a_table_drops_columns_that_give_way_until_it_fits():
    columns = [
        Column(head="id", cells=["1", "20"], right=True),
        Column(head="first", cells=["a", "b"], keep=1),
        Column(head="second", cells=["c", "d"], keep=2),
    ]
    assert [line.plain for line in table(columns, None)] == ["id  first  second", " 1  a      c", "20  b      d"]
    assert [line.plain for line in table(columns, 17)] == ["id  first  second", " 1  a      c", "20  b      d"]
    assert [line.plain for line in table(columns, 16)] == ["id  second", " 1  c", "20  d"]
    assert [line.plain for line in table(columns, 1)] == ["id", " 1", "20"]


def test_many_lags_share_the_lines_of_a_histogram(run):
    with StoreReader(run / "replay") as reader:
        stats = reader.stats()
    wide = StoreStats(**{**vars(stats), "lags": {"fresh": {}, "stale": {lag: 1 for lag in range(1, 33)}}})
    lines = [line.plain.rstrip() for line in stats_lines("toy", wide)]
    start = lines.index("lag when trained (steps), stale") + 1
    assert [line.split()[:4] for line in lines[start : start + 16]] == [
        [f"{low}–{low + 1}", "2", "6", "%"] for low in range(1, 33, 2)
    ]
    assert "lag when trained (steps), fresh" not in lines


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (107_400, "107 kB"), (999_700, "1.0 MB"), (2_500_000_000, "2.5 GB")],
)
def test_sizes_have_two_or_three_digits(num_bytes, text):
    assert size_text(num_bytes) == text


def test_a_terminal_gets_colours_and_a_pipe_does_not(monkeypatch, capsys):
    replay_view.Screen().say(iter([Text("x", style="red")]))
    assert capsys.readouterr().out == "x\n"
    terminal = Console(force_terminal=True, width=60, color_system="standard", _environ={"TERM": "xterm"})
    monkeypatch.setattr(replay_view, "Console", lambda: terminal)
    screen = replay_view.Screen()
    screen.say(iter([Text("x", style="red")]))
    assert screen.width == 60
    assert capsys.readouterr().out == "\x1b[31mx\x1b[0m\n"


@pytest.mark.parametrize(
    ("settings", "counted"),
    [
        ({"skip_no_signal": "all"}, "2 waiting, 2 consumed, 1 skipped"),
        ({"skip_no_signal": "stale"}, "3 waiting, 2 consumed"),
        ({"sample": "window", "samples_per_insert": 2.0}, "2 waiting, 2 consumed, 1 skipped"),  # takes `stale` as `all`
    ],
    ids=str,
)
def test_groups_that_the_settings_leave_out_are_skipped_and_do_not_wait(run, said, settings, counted):
    configure(run, **settings)
    with StoredRun(run / "replay") as stored:
        stored.append(make_group(4, rewards=(1.0, 1.0)))
    assert f"  {counted}\n" in said("stats", "toy").out
    state = "skipped" if "skipped" in counted else "waiting"
    assert said("ls", "toy", "--state", state, "--limit", "1").out.splitlines()[1].endswith(state)
    assert said("show", "toy", "5").out.startswith(f"group 5  prompt 0.4  {state}\n")
