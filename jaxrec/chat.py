"""From messages to a prompt: by the model's own chat template, or plainly where it has none."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
ROLES = ("system", "developer", "user", "assistant", "tool")


def chat_ids(tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens that ask a model for the next message. messages: {"role", "content"} each.

    A tokenizer without a chat template gets the contents alone, a blank line apart. What spells a control token inside
    a content is plain text. Raises ValueError for a conversation that the template refuses.
    """
    if not has_template(tokenizer):
        return tokenizer.encode("\n\n".join(message["content"] for message in messages), specials=False)
    return _rendered(tokenizer.encode_chat, messages)


def chat_text(tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """The text of a tokenizer's chat template, contents as they are. Raises ValueError for a conversation that it
    refuses."""
    return _rendered(tokenizer.chat, messages)


def _rendered(render: Callable[[list[dict[str, str]]], T], messages: Sequence[Mapping[str, str]]) -> T:
    from jinja2.exceptions import TemplateError

    try:
        return render([dict(message) for message in messages])
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error


def has_template(tokenizer) -> bool:
    """Whether the tokenizer's folder holds a chat template."""
    try:
        tokenizer.chat([{"role": "user", "content": "x"}])
    except ValueError:
        return False
    except Exception:  # it has one, which wants other messages
        return True
    return True
