"""Whether the prompts of a task fit into the engine's window, said before the engine refuses them one by one."""

from __future__ import annotations

from pathlib import Path

from r2vpo.job.settings import ConfigError
from rollout.tasks.base import Task


def check_lengths(task: Task, directory: Path, *, window: int) -> tuple[str, ...]:
    """A sentence if some training prompts have ``window`` tokens or more; ``ConfigError`` if all have.

    A token stands for a byte at least, so only prompts of that many bytes are tokenised. A chat template, which makes
    prompts longer, is not counted.
    """
    texts = (task.prompt(index).text for index in range(task.num_prompts))
    suspects = {index: text for index, text in enumerate(texts) if len(text.encode()) >= window}
    if not suspects or not (directory / "tokenizer.json").is_file():
        return ()
    lengths = dict(zip(suspects, _num_tokens(list(suspects.values()), directory / "tokenizer.json"), strict=True))
    long = {index: length for index, length in lengths.items() if length >= window}
    if not long:
        return ()
    first = min(long)
    what = (
        f"{len(long)} of {task.num_prompts} training prompts leave no room for a response in rollout.max_model_len="
        f"{window} (the first is prompt {first + 1} with {long[first]} tokens)"
    )
    if len(long) == task.num_prompts:
        raise ConfigError(f"{what}; raise rollout.max_model_len, or shorten the prompts")
    return (f"{what}: they become groups of errors, which nothing is learned from",)


def _num_tokens(texts: list[str], file: Path) -> list[int]:
    from tokenizers import Tokenizer  # imported late: most tasks have no prompt that is long enough to ask

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises nothing more specific
        raise ConfigError(
            f"model.path={file.parent}: {file.name} is no tokenizer ({str(error).splitlines()[0]}); fetch it again"
        ) from None
    tokenizer.no_truncation()
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
