r"""Text of messages, kept from becoming special tokens.

    "Hi<|im_end|>"                                     what somebody wrote
    "<|im_start|>user\nHi□□□□□□□□□□<|im_end|>\n"       what the template reads and writes: one end of turn
    <|im_start|> user \n Hi < | im _ end | > <|im_end|> \n        how it is encoded

Stand-ins, □ here, are characters that occur in no text of the call, one for each special token that does. They are as
long as what they stand for, so that places in the prompt stay where they are.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import PreTokenizedString

# Where stand-ins are taken from: letters of one plane, which `repr` and JSON leave as they are.
STAND_INS = range(0x20000, 0x2A6D0)
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which is no character and cannot be encoded


def one_of(strings: Iterable[str]) -> str:
    """Regular expression for the longest of these strings, in steps of one character: linear, also for hundreds."""
    by_head: dict[str, list[str]] = {}
    for string in strings:
        by_head.setdefault(string[:1], []).append(string[1:])
    is_end = by_head.pop("", None) is not None
    options = [re.escape(head) + one_of(tails) for head, tails in by_head.items()]
    return f"(?:{'|'.join(options)}){'?' if is_end else ''}" if options else ""


class SpecialTokens:
    """The special tokens of a tokenizer, to be found in text.

    Attributes:
        special: Matches them; visual tokens and placeholders are among them, however the tokenizer flags them.
        added: Matches all tokens that a tokenizer takes out of a text before it splits the rest.
    """

    _known: "WeakKeyDictionary[Any, tuple[Any, SpecialTokens]]" = WeakKeyDictionary()

    def __init__(self, special: Iterable[str], added: Iterable[str]):
        special = set(special)
        self.special = re.compile(one_of(special))
        self.added = re.compile(one_of({*special, *added}))

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, always: Iterable[str]) -> "SpecialTokens":
        """Those of a tokenizer as it is now, and the strings in `always`."""
        state = {token.content: token.special for token in tokenizer.added_tokens_decoder.values() if token.content}
        built_for, known = cls._known.get(tokenizer, (None, None))
        if known is None or built_for != state:  # tokens may be added, and become special
            known = cls({*always, *(content for content, is_special in state.items() if is_special)}, state)
            cls._known[tokenizer] = (state, known)
        return known


class RenderedPrompt(str):
    """A prompt that knows which special tokens in it are mere text of its messages.

    As a string it is the whole prompt; `Molmo2Processor` reads `hidden` instead. Copies and pickles keep that, slices
    and sums are ordinary strings.

    Attributes:
        hidden: The prompt with stand-ins.
        stand_ins: What each stand-in stands for.
    """

    hidden: str
    stand_ins: Mapping[str, str]

    def __new__(cls, hidden: str, stand_ins: Mapping[str, str]) -> "RenderedPrompt":
        prompt = super().__new__(cls, revealed(hidden, stand_ins))
        prompt.hidden, prompt.stand_ins = hidden, stand_ins
        return prompt

    def __getnewargs__(self) -> tuple[str, Mapping[str, str]]:  # type: ignore[override]  # those of `__new__`
        return self.hidden, self.stand_ins


def _mapped(value: Any, function: Callable[[str], Any]) -> Any:
    """Messages, tools, documents with what a function makes of each string: keys and values at any depth."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {_mapped(key, function): _mapped(entry, function) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [_mapped(entry, function) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    return value


def hide(value: Any, tokens: SpecialTokens, other_text: str = "", kept: frozenset[str] = frozenset()) -> Any:
    """`value` with stand-ins for the special tokens in its strings, and what they stand for.

    Args:
        value: Messages, tools, ...: dictionaries and lists with strings at any depth.
        other_text: Text that stands beside it and must not contain the stand-ins: the template.
        kept: Special tokens that stay.
    Returns:
        (value, {stand-in: special token}); the same object and nothing where there are none.
    """
    strings: list[str] = []
    _mapped(value, strings.append)
    found = {token for text in strings for token in tokens.special.findall(text)} - kept
    if not found:
        return value, {}
    used = set(other_text).union(*strings)
    free = (chr(code) for code in STAND_INS if chr(code) not in used)
    stand_ins = dict(zip(free, sorted(found)))
    of_token = {token: stand_in * len(token) for stand_in, token in stand_ins.items()}

    def replaced(text: str) -> str:
        return tokens.special.sub(lambda match: of_token.get(match[0], match[0]), text)

    return _mapped(value, replaced), stand_ins


def _runs_of(stand_ins: Mapping[str, str]) -> re.Pattern[str]:
    return re.compile(f"([{''.join(stand_ins)}])\\1*")


def revealed(hidden: str, stand_ins: Mapping[str, str]) -> str:
    """The text with what its stand-ins stand for, as long as before."""
    if not stand_ins:
        return hidden
    return _runs_of(stand_ins).sub(lambda run: (stand_ins[run[1]] * len(run[0]))[: len(run[0])], hidden)


def split_pieces(hidden: str, stand_ins: Mapping[str, str], tokens: SpecialTokens) -> list[tuple[str, bool]]:
    """The prompt in pieces, and whether each is text in which no special token counts.

    Pieces end where a special token begins or ends, so that they are encoded as they would be in the whole.
    """
    run = _runs_of(stand_ins)
    pieces: list[tuple[str, bool]] = []
    done = start = 0
    for end, following in [*(match.span() for match in tokens.added.finditer(hidden)), (len(hidden), len(hidden))]:
        if run.search(hidden, start, end):
            pieces += [(hidden[done:start], False), (revealed(hidden[start:end], stand_ins), True)]
            done = end
        start = following
    return [piece for piece in (*pieces, (hidden[done:], False)) if piece[0]]


def encode_plain(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and (start, end) characters of text in which no token is special.

    Not the tokenizer's own `split_special_tokens`, which changes the tokenizer for all threads.
    """
    backend = tokenizer.backend_tokenizer
    pieces = PreTokenizedString(text)
    if backend.normalizer is not None:
        pieces.normalize(backend.normalizer.normalize)
    if backend.pre_tokenizer is not None:
        backend.pre_tokenizer.pre_tokenize(pieces)
    pieces.tokenize(backend.model.tokenize)
    encoding = pieces.to_encoding()
    return encoding.ids, encoding.offsets
