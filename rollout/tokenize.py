"""From the text of a prompt to token ids."""

from __future__ import annotations

from collections.abc import Callable


def make_tokenize(model_path: str, *, chat: bool, trust_remote_code: bool) -> Callable[[str], list[int]]:
    """The tokenizer of the model at ``model_path``; with ``chat`` the text becomes a user's message in its template.

    Raises ``ValueError`` if a chat template is asked for and the tokenizer has none.
    """
    from transformers import AutoTokenizer  # imported late: it takes a second that other importers need not pay

    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    if not chat:
        return lambda text: tokenizer(text)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError(f"task.chat=true, but the tokenizer of model.path={model_path} has no chat template")

    def tokenize(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    return tokenize
