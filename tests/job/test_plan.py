import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from r2vpo import cli
from r2vpo.job import plan as module
from r2vpo.job import plan_find
from r2vpo.job.config import ConfigError, RunConfig, load_config
from r2vpo.job.plan import make_plan
from r2vpo.job.plan_checks import problems, warnings
from r2vpo.job.plan_cluster import simulated
from r2vpo.job.plan_facts import Plan, plan_facts
from r2vpo.job.plan_model import ModelShape, read_shape
from r2vpo.job.plan_sync import Sync, copy_bandwidth

CONFIGS = Path(__file__).parents[2] / "configs"
MIB = 1 << 20
QWEN = {  # Qwen2.5-Math-1.5B-Instruct
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
QWEN_SHAPE = ModelShape(
    architecture="Qwen2ForCausalLM",
    num_parameters=1_543_714_304,
    layers=28,
    hidden=1536,
    intermediate=8960,
    query=1536,
    key_value=256,
    vocabulary=151936,
    dtype="bfloat16",
)
LARGER = ModelShape(  # the model of the larger run on a CPU, see docs/plan.md
    architecture="Qwen2ForCausalLM",
    num_parameters=41_566_720,
    layers=8,
    hidden=512,
    intermediate=1536,
    query=512,
    key_value=256,
    vocabulary=16000,
    dtype="float32",
)
LAPTOP = "cpus=2,memory_gb=24"
NODE = "gpus=8,cpus=96,memory_gb=1000,gpu_memory_gb=80"


def planned(config: RunConfig, model: ModelShape, cluster: str, **settings) -> Plan:
    return plan_facts(config, simulated(cluster), model, bandwidth=1e9, measured=False, step_s=60, **settings)


def quickstart(*overrides: str) -> RunConfig:
    return load_config(CONFIGS / "quickstart.yaml", overrides)


R1_QWEN_SHAPE = replace(QWEN_SHAPE, num_parameters=1_777_088_000)  # the same with a head of its own
QWEN_7B_SHAPE = replace(
    QWEN_SHAPE,
    num_parameters=7_615_616_512,
    hidden=3584,
    intermediate=18944,
    query=3584,
    key_value=512,
    vocabulary=152064,
)
RECIPES = {
    "quickstart": (LARGER, LAPTOP),
    "math-qwen-1.5b": (QWEN_SHAPE, NODE),
    "math-qwen-1.5b-one-gpu": (QWEN_SHAPE, "gpus=1,cpus=16,memory_gb=120,gpu_memory_gb=80"),
    "math-qwen-7b": (QWEN_7B_SHAPE, f"nodes=2,{NODE}"),
    "r1-qwen-1.5b": (R1_QWEN_SHAPE, NODE),
}
"""The model of every recipe, and machines like those that it was written for."""


def math_recipe(*overrides: str) -> RunConfig:
    return load_config(CONFIGS / "math-qwen-1.5b.yaml", overrides)


def test_every_recipe_has_machines_to_be_planned_for():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_accepted_on_a_cluster_of_its_shape(name):
    model, cluster = RECIPES[name]
    plan = planned(load_config(CONFIGS / f"{name}.yaml"), model, cluster)
    assert problems(plan) == []
    if name != "quickstart":  # whose model here is a larger one
        assert not any(
            "GPUs stay idle" in sentence or "goes by way of the disk" in sentence for sentence in warnings(plan)
        )


@pytest.mark.parametrize(
    ("name", "learner_gib", "engine_gib", "main_gib"),
    [
        ("math-qwen-1.5b", 23, 68, [38]),
        ("math-qwen-1.5b-one-gpu", 34, 11, [17]),
        ("math-qwen-7b", 25, 68, [105, 159]),
        ("r1-qwen-1.5b", 19, 68, [43]),
    ],
)
def test_the_memory_that_a_recipe_states_is_what_the_plan_says(name, learner_gib, engine_gib, main_gib):
    plan = planned(load_config(CONFIGS / f"{name}.yaml"), *RECIPES[name])
    assert round(plan.learner.total / 2**30) == learner_gib
    assert round((plan.engine.total or 0) / 2**30) == engine_gib
    assert [round(host.total / 2**30) for host in plan.hosts] == main_gib


def test_the_quickstart_can_start_here_and_its_plan_says_how_it_is_made_up(capsys):
    assert cli.main(["plan", str(CONFIGS / "quickstart.yaml"), "name=new", "--bandwidth", "1"]) == 0
    text = capsys.readouterr().out
    for part in (
        "16 new × rollout.group_size=8 = 128 new trajectories",
        "16 fresh + 16 stale groups = 256 trajectories",
        "4 steps, each on 8 groups = 64 trajectories",
        # 64 trajectories of 32 tokens in rows of 512
        "4 per optimiser step on each of 1 rank, of ≤ 512 tokens",
        "100 steps: 1,600 prompts, 0.08 epochs of 20,000; 400 optimiser steps",
        "≤ 2: at most 16 × (replay.max_lag=2 + 1) = 48 groups",
        "140,224 parameters",
        "this run can start",
    ):
        assert part in text


def test_passes_over_the_batch_multiply_the_optimiser_steps(capsys):
    assert cli.main(["plan", str(CONFIGS / "quickstart.yaml"), "--bandwidth", "1", "learner.passes=3"]) == 0
    told = capsys.readouterr().out
    assert "4 steps in each of at most 3 passes, each on 8 groups" in told
    assert "100 steps: 1,600 prompts" in told
    assert "1,200 optimiser steps" in told


def test_memory_of_the_two_measured_runs_is_within_a_fifth():
    """Sum of the PSS of all processes at its largest, two cores, no GPU: docs/plan.md says how it was measured."""
    small = ModelShape(
        architecture="Qwen2ForCausalLM",
        num_parameters=140_224,
        layers=2,
        hidden=64,
        intermediate=192,
        query=64,
        key_value=64,
        vocabulary=258,
        dtype="float32",
    )
    larger = quickstart(
        "rollout.group_size=4",
        "rollout.max_tokens=64",
        "rollout.max_model_len=128",
        "rollout.groups_in_flight=4",
        "rollout.kv_cache_gb=0.5",
        "learner.groups_per_step=16",
        "learner.minibatches=2",
        "learner.micro_batch_tokens=2048",
        "ray.object_store_mb=600",
    )
    for config, model, measured_mib in ((quickstart(), small, 2534), (larger, LARGER, 5400)):
        [host] = planned(config, model, LAPTOP).hosts
        assert host.total / MIB == pytest.approx(measured_mib, rel=0.2)


def test_a_broadcast_of_the_weights_needs_gpus_and_no_room_in_the_object_store():
    assert (
        problems(planned(math_recipe("learner.weight_transport=nccl", "learner.bucket_mb=600"), QWEN_SHAPE, NODE)) == []
    )
    plan = planned(quickstart("learner.weight_transport=nccl", "learner.num_gpus=null"), LARGER, LAPTOP)
    assert "learner.weight_transport=nccl broadcasts from GPU to GPU" in " ".join(problems(plan))


@pytest.mark.parametrize(
    ("overrides", "cluster", "parts"),
    [
        ([], LAPTOP, ["ask for 8 GPUs and the cluster has 0", "rollout.workers=4", "learner.ranks=4"]),
        ([], "nodes=2,gpus=4,cpus=8,memory_gb=500,gpu_memory_gb=80", ["ask for 32 CPUs and the cluster has 16"]),
        (
            ["rollout.tensor_parallel_size=4", "rollout.num_gpus=null", "rollout.workers=1"],
            "nodes=4,gpus=2,cpus=96,memory_gb=500,gpu_memory_gb=80",
            ["enough in all", "asks for 4 GPUs", "the largest has 2"],
        ),
        (
            [],
            "gpus=8,cpus=96,memory_gb=1000,gpu_memory_gb=16",
            ["needs 22.7 GiB and its GPU has 16.0 GiB", "set learner.micro_batch_tokens=4096, which needs 13.0 GiB"],
        ),
        (["rollout.kv_cache_gb=100"], NODE, ["100 GiB of it for rollout.kv_cache_gb=100", "a GPU has 80.0 GiB"]),
        (["rollout.kv_cache_gb=0.1"], NODE, ["needs 112 MiB of KV cache", "has 103 MiB", "to 0.109 or more"]),
        ([], "gpus=8,cpus=96,memory_gb=20,gpu_memory_gb=80", ["machine 1 would need 38.4 GiB", "has 20.0 GiB"]),
        (
            ["learner.bucket_mb=600", "ray.object_store_mb=512"],
            NODE,
            ["takes 600 MiB", "has 512 MiB", "lower learner.bucket_mb=600"],
        ),
        (
            ["rollout.num_gpus=0.5", "learner.num_gpus=0.5"],
            "gpus=4,cpus=96,memory_gb=1000,gpu_memory_gb=80",
            ["rank (22.7 GiB) and an engine (68.0 GiB) share a GPU", "rollout.num_gpus=0.5", "it has 80.0 GiB"],
        ),
    ],
    ids=["no GPU", "CPUs", "not together", "learner", "engine", "KV cache", "main memory", "bucket", "shared GPU"],
)
def test_what_cannot_work_is_refused_with_both_numbers_and_the_fix(overrides, cluster, parts):
    [sentence] = problems(planned(math_recipe(*overrides), QWEN_SHAPE, cluster))
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("config", "cluster", "part"),
    [
        (quickstart("rollout.workers=3"), LAPTOP, "reserve 4 CPUs and the machine has 2"),
        (quickstart("rollout.omp_threads=4"), LAPTOP, "compute with 5 threads and there are 2 CPUs"),
        (quickstart("learner.zero_stage=2"), LAPTOP, "learner.zero_stage=2 shards nothing"),
        (quickstart("learner.micro_batch_tokens=16"), LAPTOP, "micro_batch_tokens=16 is less than"),
        (quickstart("rollout.kv_cache_gb=null"), LAPTOP, "rollout.kv_cache_gb=null lets vLLM take most"),
        (quickstart("rollout.groups_in_flight=80"), LAPTOP, "the rest idles"),
        # 0.25 GiB are 32,768 tokens of 8 KiB: 2 × 8 layers × 256 × 4 bytes is 16 KiB, so 16,384
        (quickstart("rollout.groups_in_flight=48", "rollout.group_size=16"), LAPTOP, "holds 16,384 tokens"),
        (quickstart(), "cpus=2,memory_gb=4.5", "of main memory"),
        (quickstart("rollout.workers=1"), "nodes=2,cpus=2,memory_gb=24", "ray.address=null starts a Ray on one"),
        # 3 × 159 MiB of 256 MiB
        (quickstart(), LAPTOP, "3 versions of the weights take 476 MiB and Ray's object store has 256 MiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wasteful_is_a_warning(config, cluster, part):
    plan = planned(config, LARGER, cluster)
    assert problems(plan) == []
    assert any(part in sentence for sentence in warnings(plan)), warnings(plan)


def test_idle_gpus_and_a_disk_that_the_store_may_fill_are_warned_about():
    plan = planned(math_recipe("rollout.workers=2"), QWEN_SHAPE, NODE, free_bytes=10**9)
    assert any("2 of 8 GPUs stay idle" in sentence for sentence in warnings(plan))
    assert any("the replay store may grow to 14.7 GiB and the disk has 954 MiB" in s for s in warnings(plan))


def test_growth_of_the_store_per_hour():
    plan = planned(quickstart(), LARGER, LAPTOP)
    # 8 trajectories of 32 tokens × 13 bytes and 12 × 4 of text, and 1300; 16 new groups, 32 uses of 160
    assert plan.growth.group_bytes == 8 * (32 * 13 + 12 * 4) + 1300 == 5012
    assert plan.growth.step_bytes == 16 * 5012 + 32 * 160 == 85_312
    assert plan.growth.hour_bytes == 60 * 85_312


def test_seconds_of_a_sync():
    sync = Sync(num_bytes=2e9, bandwidth=4e9, measured=False)
    assert (sync.publish_s, sync.fetch_s) == (1.5, 1.0)
    assert sync.pause_s == pytest.approx(1.046)


def test_the_bandwidth_of_memory_is_measured():
    assert 1e7 < copy_bandwidth(0.01) < 1e13


def test_parameters_without_weights_are_counted_from_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    assert read_shape(tmp_path, num_parameters=None) == QWEN_SHAPE
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        plan_find.find_model(str(tmp_path), elsewhere=False)


def test_a_hub_id_without_a_network_is_one_sentence(monkeypatch):
    def unreachable(self, model_id, timeout):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda model_id, file: None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(ConfigError, match=r"org/name is no local directory.*neither cached nor to be had \(OSError\)"):
        plan_find.find_model("org/name", elsewhere=True)


def test_a_model_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "hidden_size": 8}))
    with pytest.raises(ConfigError, match="does not say 'num_attention_heads'"):
        read_shape(tmp_path, num_parameters=1)


def test_json_has_the_same_numbers_and_a_refused_run_exits_with_2(capsys):
    arguments = ["plan", str(CONFIGS / "quickstart.yaml"), "rollout.num_gpus=1", "--json", "--cluster", LAPTOP]
    assert cli.main(arguments) == 2
    printed = json.loads(capsys.readouterr().out)
    assert printed["can_start"] is False
    assert "ask for 1 GPUs and the cluster has 0" in printed["problems"][0]
    assert printed["batch"]["trajectories"] == 256
    assert printed["learner"]["weights"] == 4 * 140_224


def test_a_plan_here_checks_what_train_checks(tmp_path):
    config = quickstart(f"run_dir={tmp_path}", "rollout.max_model_len=4096")
    with pytest.raises(ConfigError, match="max_model_len=4096 exceeds the 2048 positions"):
        make_plan(config, None, bandwidth=1e9)
    absent = replace(config, model=replace(config.model, path="/no/such/model"))
    with pytest.raises(ConfigError, match="/no/such/model does not exist"):
        make_plan(absent, simulated(LAPTOP), bandwidth=1e9)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--cluster", "cpus=2"], "does not say memory_gb"),
        (["--bandwidth", "0"], "0 must be a number above 0"),
        (["--step-s", "soon"], "soon must be a number above 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_options_end_in_one_sentence(arguments, part, capsys):
    assert cli.main(["plan", str(CONFIGS / "quickstart.yaml"), *arguments]) == 2
    message = capsys.readouterr().err
    assert part in message
    assert message.count("\n") == 1


def test_a_plan_imports_nothing_heavy_and_makes_nothing(tmp_path):
    code = "import sys\nfrom r2vpo.cli import main\ncode = main(sys.argv[1:])\nprint(*sys.modules)\nsys.exit(code)"
    argv = ["plan", str(CONFIGS / "quickstart.yaml"), f"run_dir={tmp_path / 'runs'}"]
    ended = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert not {"ray", "torch", "vllm", "transformers", "deepspeed"} & set(ended.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_a_cluster_looks_like(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    assert "nodes=2,gpus=8,cpus=96" in capsys.readouterr().out
    assert module.STEP_S == 60
