"""Tokenizers: Hugging Face's fast ones behind a small interface, and an own one whose pieces are whole phrases.

Text goes in and comes out exactly as it is: nothing is added in front or behind, nothing is cleaned up. The exact bytes
of every id are available, so that stop strings and formats can be followed while sampling without decoding.
"""

import functools
import json
import re
import secrets
import shutil
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

# What a Hugging Face folder may hold for its tokenizer; copied as they are when a loaded tokenizer is saved.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")

_PHRASE, _CHARACTER, _NEVER = -1.0, -10.0, -10_000.0  # log scores: the fewest pieces win, fall-backs only where needed
_CHARACTERS = string.printable[:-5] + "\n"  # letters, digits, punctuation, space; \t \r \v \f go through bytes
_UTF8_BYTES = tuple(b for b in range(256) if b not in (0xC0, 0xC1) and b < 0xF5)  # the others occur in no UTF-8 text


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer."""

    eos_ids: tuple[int, ...]
    vocab_size: int

    def encode(self, text: str, specials: bool = True) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def token_bytes(self) -> list[bytes]: ...

    def save(self, path: str | Path) -> None: ...


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest is moved above U+0100."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in set(kept)]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(moved)}


class FastTokenizer:
    """A `tokenizers` model with the settings of its Hugging Face folder.

    ``eos_ids`` is the configured end token (a model may name more of them: see ``Config.eos_ids``); ``pad_id`` and
    ``bos_id`` are None when the tokenizer has none. ``vocab_size`` is the highest id + 1: models often have more rows.
    """

    def __init__(self, backend, settings: dict[str, Any] | None = None, folder: str | Path | None = None):
        self.settings = dict(settings or {})
        self._backend = backend
        self._backend.no_truncation()  # some tokenizer.json carry the limits of the run that trained them
        self._backend.no_padding()
        self._folder = None if folder is None else Path(folder)
        self._bytes: list[bytes] | None = None
        self._template = None
        eos = self._special("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.pad_id: int | None = self._special("pad_token")
        self.bos_id: int | None = self._special("bos_token")
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())

    def _special(self, name: str) -> int | None:
        token = self.settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """Ids of ``text`` with nothing added around it.

        A tag such as ``<|im_end|>`` becomes its one id where the tokenizer has it, else the ids of its characters.
        specials: False encodes such tags as plain characters too, for text that must not be able to forge control
        tokens (retrieved passages, user input).
        """
        self._backend.encode_special_tokens = not specials
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], specials: bool = True) -> list[list[int]]:
        """``encode`` of many texts, in parallel."""
        self._backend.encode_special_tokens = not specials
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def control_tokens(self) -> tuple[str, ...]:
        """Special tokens, and others in angle brackets, that :meth:`encode` finds anywhere in a text."""
        added = self._backend.get_added_tokens_decoder().values()
        texts = (token.content for token in added if token.special or token.content.startswith("<"))
        return tuple(text for text in texts if len(text.strip()) > 1)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, special tokens included, without clean-up; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id contributes to the text, by id; ids without a token are empty.

        Exact for byte-level BPE and for the tokenizers of :func:`build_word_tokenizer`: joined, they are the UTF-8
        bytes of the decoded text. Sentencepiece-like models drop one space at the very start of a text when decoding,
        which the bytes keep. WordPiece decoding depends on neighbours; there a word start is its space and its text.
        """
        if self._bytes is None:
            table = [b""] * self.vocab_size
            to_bytes = _bytes_of_token(json.loads(self._backend.to_str()).get("decoder"))
            for token, index in self._backend.get_vocab(with_added_tokens=True).items():
                table[index] = to_bytes(token)
            self._bytes = table
        return self._bytes

    def chat(self, messages: Sequence[dict[str, str]], **options) -> str:
        """The text of a conversation by the folder's chat template (``add_generation_prompt=True`` by default).

        Raises ValueError when the folder has no chat template.
        """
        if self._template is None:
            if self._folder is None:
                raise ValueError("this tokenizer was not read from a folder and has no chat template")
            from transformers import PreTrainedTokenizerFast

            self._template = PreTrainedTokenizerFast.from_pretrained(self._folder)
            if not self._template.chat_template:
                raise ValueError(
                    f"{self._folder}: tokenizer_config.json holds no chat_template; write the prompt as text"
                )
        return self._template.apply_chat_template(
            list(messages), tokenize=False, **{"add_generation_prompt": True, **options}
        )

    def encode_chat(self, messages: Sequence[dict[str, str]], **options) -> list[int]:
        """Ids of :meth:`chat`'s text in which every control token is the template's own.

        What spells one inside a message's content becomes its characters, as with transformers'
        ``split_special_tokens``: no message can end its own turn or begin another's. The whole text is encoded at once,
        so that nothing else changes. Raises ValueError as :meth:`chat` does.
        """
        names = self._other_names
        if not any(names.found(message["content"]) for message in messages):
            return self.encode(self.chat(messages, **options))
        hidden = [{**message, "content": names.hide(message["content"])} for message in messages]
        return names.encode(self.chat(hidden, **options))

    @functools.cached_property
    def _other_names(self) -> "_OtherNames":
        return _OtherNames(self._backend)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer's files into folder ``path`` (made if missing): loadable by ``AutoTokenizer``.

        A tokenizer read from a folder is copied byte for byte. One exception outside our reach: transformers 5 reads
        the tokenizer of every folder whose config.json says ``qwen2`` as Qwen2's own class; another tokenizer beside
        such a model is read with ``PreTrainedTokenizerFast``, or belongs to a model of family llama or qwen3.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if self._folder is not None:
            for name in FILES:
                if (self._folder / name).is_file() and self._folder.resolve() != path.resolve():
                    shutil.copyfile(self._folder / name, path / name)
            return
        self._backend.encode_special_tokens = False
        self._backend.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")


class _OtherNames:
    """A tokenizer whose control tokens go by names that nobody can guess, so that their own spellings are plain text.

    A template's text is encoded with it once its control tokens are renamed. Those inside contents are hidden from that
    behind words of digits, which templates pass on as they are, and come back afterwards.
    """

    def __init__(self, backend):
        controls = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        # The longest first: where one begins like another, that is the one a tokenizer reads.
        controls.sort(key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, controls)) or "(?!)")
        self._names = {control: secrets.token_hex(16) for control in controls}
        # Digits, since a template may change the case.
        self._hidden = {control: f"{secrets.randbits(128):039d}" for control in controls}
        self._shown = {word: control for control, word in self._hidden.items()}
        self._words = re.compile("|".join(self._shown) or "(?!)")
        self._original = backend

    def found(self, text: str) -> bool:
        """Whether a control token is spelt in the text."""
        return self._pattern.search(text) is not None

    def hide(self, content: str) -> str:
        """The content with words in the place of control tokens."""
        return self._pattern.sub(lambda match: self._hidden[match[0]], content)

    def encode(self, rendered: str) -> list[int]:
        """Ids of a template's text of hidden contents, in the original tokenizer's numbers."""
        text = self._pattern.sub(lambda match: self._names[match[0]], rendered)
        text = self._words.sub(lambda match: self._shown[match[0]], text)
        backend, numbers = self._renamed
        return [numbers.get(index, index) for index in backend.encode(text, add_special_tokens=False).ids]

    @functools.cached_property
    def _renamed(self) -> tuple[Any, dict[int, int]]:
        """The renamed tokenizer, and the original id of each added token in it: new names get new ids."""
        whole = json.loads(self._original.to_str())
        numbers = {}
        for token in whole["added_tokens"]:
            numbers[token["content"]] = token["id"]
            if token["special"]:
                token["content"] = self._names[token["content"]]
        backend = type(self._original).from_str(json.dumps(whole))
        named = {self._names.get(content, content): index for content, index in numbers.items()}
        return backend, {backend.token_to_id(name): index for name, index in named.items()}


def _bytes_of_token(decoder: dict[str, Any] | None):
    """Function token -> bytes, from the ``decoder`` entry of a tokenizer.json."""
    parts = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {part["type"] for part in parts}
    alphabet = _byte_alphabet()
    by_token = {f"<0x{b:02X}>": bytes([b]) for b in range(256)} if "ByteFallback" in kinds else {}
    spaces = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    spaces += [p["pattern"]["String"] for p in parts if p["type"] == "Replace" and p["content"] == " "]
    prefix = next((part["prefix"] for part in parts if part["type"] == "WordPiece"), None)

    def to_bytes(token: str) -> bytes:
        if "ByteLevel" in kinds:
            # As the decoder does: a token with a character outside the alphabet (an added token) is its own text.
            if all(c in alphabet for c in token):
                return bytes(alphabet[c] for c in token)
            return token.encode()
        if token in by_token:
            return by_token[token]
        if prefix is not None:
            return (token.removeprefix(prefix) if token.startswith(prefix) else " " + token).encode()
        for space in spaces:
            token = token.replace(space, " ")
        return token.encode()

    return to_bytes


def load_tokenizer(path: str | Path) -> FastTokenizer | None:
    """The tokenizer of a Hugging Face folder; None when the folder has no tokenizer files.

    ``tokenizer.json`` is read as it is; older files (``vocab.json`` + ``merges.txt``, ``tokenizer.model``) are
    converted by transformers. Raises ValueError for files that cannot be read.
    """
    from tokenizers import Tokenizer as Backend

    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give the folder that holds tokenizer.json")
    if not any((path / name).is_file() for name in _VOCABULARIES):
        return None
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            try:
                settings |= {k: v for k, v in json.loads((path / name).read_text()).items() if v is not None}
            except json.JSONDecodeError as error:
                raise ValueError(f"{path / name}: not valid JSON: {error}") from error
    if (path / "tokenizer.json").is_file():
        try:
            return FastTokenizer(Backend.from_file(str(path / "tokenizer.json")), settings, path)
        except Exception as error:  # the Rust library raises bare Exception
            raise ValueError(f"{path / 'tokenizer.json'}: not a tokenizer file: {error}") from error
    from transformers import AutoTokenizer

    converted = AutoTokenizer.from_pretrained(path)
    if not converted.is_fast:
        raise ValueError(f"{path}: its tokenizer has no fast form; save it once with tokenizer.json and load that")
    return FastTokenizer(converted.backend_tokenizer, settings, path)


def build_word_tokenizer(
    phrases: Iterable[str], specials: Sequence[str] = (), *, pad: str = "<|pad|>", eos: str = "<|eos|>"
) -> FastTokenizer:
    """A small lossless tokenizer in which every given phrase is one token.

    Made for models trained on a closed world (item titles, tags, numbers): a Unigram model (arXiv 1804.10959) without
    pre-tokenizer, in which the segmentation with the fewest phrases wins, printable ASCII and the newline are single
    pieces for everything else, and other characters fall back to their UTF-8 bytes: ``decode(encode(x)) == x`` for any
    text. Sampled ids are not always the encoding of their text ("Bra", "ss" may stand for "Brass"), therefore sampled
    ids must be kept, never decoded and encoded again.

    phrases: may hold spaces, newlines and tags; the order gives the ids, duplicates count once.
    specials: control tokens beside ``pad`` (id 0) and ``eos`` (id 1), recognised in text unless ``specials=False``.
    Ids: specials, then phrases, characters, bytes. Raises ValueError for an empty phrase.
    """
    from tokenizers import AddedToken, decoders
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import Unigram

    controls = list(dict.fromkeys([pad, eos, *specials]))
    chosen = [phrase for phrase in dict.fromkeys(phrases) if phrase not in controls]
    if "" in controls or "" in chosen:
        raise ValueError("a phrase or special token of the tokenizer is empty")
    byte_pieces = [f"<0x{b:02X}>" for b in _UTF8_BYTES if chr(b) not in _CHARACTERS]
    clash = next((phrase for phrase in chosen if phrase in byte_pieces), None)
    if clash is not None:
        raise ValueError(f"phrase {clash!r} is the name of a byte piece; leave it out")
    # Controls and byte pieces lose against any spelling by characters: text that looks like one stays text.
    vocabulary = [(token, _NEVER) for token in controls]
    vocabulary += [(phrase, _PHRASE) for phrase in chosen]
    vocabulary += [(c, _CHARACTER) for c in _CHARACTERS if c not in chosen and c not in controls]
    vocabulary += [(piece, _NEVER) for piece in byte_pieces]
    backend = Backend(Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    if len(controls) > 2:
        settings["additional_special_tokens"] = controls[2:]
    return FastTokenizer(backend, settings)
