from benchmarks.faults.checkpoint import figures


def line(*, save_s: float, step_s: float, idle: float) -> dict:
    return {"time/save_s": save_s, "time/step_s": step_s, "rollout/idle_fraction": idle}


def test_the_share_of_checkpoints_is_that_of_one_in_as_many_steps_as_the_default_interval():
    filling = line(save_s=0.0, step_s=90.0, idle=0.9)
    plain = [line(save_s=0.0, step_s=step_s, idle=0.25) for step_s in (1.0, 2.0, 5.0)]
    saving = [line(save_s=save_s, step_s=7.0, idle=0.5) for save_s in (1.0, 5.0, 100.0)]
    share, more_idle, save, step = figures([filling, *plain, *saving])
    # one checkpoint of 5 s (median) for every 50 steps of 2 s: 5 / 105
    assert (save.value, step.value) == (5.0, 2.0)
    assert share.value == 5 / 105
    assert share.ok
    assert (more_idle.value, more_idle.ok) == (0.25, False)
