import asyncio

from r2vpo.job.errorlog import ErrorLog


def test_errors_are_appended_with_their_causes(tmp_path):
    log = ErrorLog(tmp_path / "error.log")
    try:
        try:
            raise OSError("the cause")
        except OSError as cause:
            raise ValueError("the effect") from cause
    except ValueError as error:
        log.add("the run failed", error)
    log.add("later", None)
    text = (tmp_path / "error.log").read_text()
    assert text.index("the run failed") < text.index("OSError: the cause") < text.index("ValueError: the effect")
    assert text.index("the effect") < text.index("later")


def test_a_log_that_cannot_be_written_is_no_further_error(tmp_path):
    ErrorLog(tmp_path / "missing" / "error.log").add("the run failed", ValueError("x"))


async def test_what_an_event_loop_has_nobody_to_tell_goes_to_the_log(tmp_path, capfd):
    asyncio.get_running_loop().set_exception_handler(ErrorLog(tmp_path / "error.log").on_stray)

    async def fail() -> None:
        raise ValueError("unseen")

    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    del task
    await asyncio.sleep(0)
    text = (tmp_path / "error.log").read_text()
    assert "Task exception was never retrieved" in text
    assert "ValueError: unseen" in text
    assert capfd.readouterr().err == ""
