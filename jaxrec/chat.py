"""From messages to a prompt: by the model's own chat template, or plainly where it has none."""

from collections.abc import Mapping, Sequence

ROLES = ("system", "developer", "user", "assistant", "tool")


def chat_prompt(tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that asks a model for the next message. messages: {"role", "content"} each.

    A tokenizer without a chat template gets the contents alone, a blank line apart. Raises ValueError for a
    conversation that the template refuses.
    """
    if not has_template(tokenizer):
        return "\n\n".join(message["content"] for message in messages)
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.chat([dict(message) for message in messages])
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
