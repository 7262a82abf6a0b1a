"""From messages to a prompt: by the model's own chat template, or plainly where it has none."""

from collections.abc import Mapping, Sequence

ROLES = ("system", "developer", "user", "assistant", "tool")


def chat_ids(tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens that ask a model for the next message. messages: {"role", "content"} each.

    A tokenizer without a chat template gets the contents alone, a blank line apart. What spells a control token inside
    a content is plain text. Raises ValueError for a conversation that the template refuses.
    """
    if not has_template(tokenizer):
        return tokenizer.encode("\n\n".join(message["content"] for message in messages), specials=False)
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.encode_chat([dict(message) for message in messages])
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
