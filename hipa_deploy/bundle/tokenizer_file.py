"""What a ``tokenizer.json`` may ask of the tokenizers library.

The library is compiled, and it believes the file: a padding of 10**12 tokens ends the process, and
some regular expressions take longer than anybody waits. So the numbers and patterns are checked
before the library sees them. The limits are far beyond what a text encoder's tokenizer has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_TOKENIZER = 64 << 20  # bytes of the file; CLIP's has 4 MB, the largest known 17 MB
MAX_TOKENS = 4096  # of a prompt; CLIP reads 77
_MAX_ADDED = 100_000  # tokens beside the vocabulary
_MAX_PARTS = 500  # values in the normaliser, the splitting and the post-processing together
_MAX_TEXT = 500  # characters of a pattern or of a special token
_MAX_INSERTED = 4  # characters that a normaliser may put in for each one that it finds
_MAX_REPLACEMENTS = 4
_MAX_WORDS = 10_000  # rules of embeddings, of all together
_MAX_VECTORS = 75  # of an embedding, as many as a prompt of 77 tokens has
# What stands for the vectors of embeddings (``hipa_deploy.models.clip_tokenizer``): Unicode's
# supplementary private use area A, which nobody types.
PRIVATE = range(0xF0000, 0xFFFFE)
_MAX_REPEATS = 3  # unlimited repetitions in one alternative of a pattern
# Parts of the file that decide how a prompt is read, besides the vocabulary.
_STEPS = ("normalizer", "pre_tokenizer", "post_processor")
# A repetition of a group, and a reference to what a group matched: the patterns that can take time
# exponential in the length of the prompt.
_EXPONENTIAL = re.compile(r"\)[*+{?]?[*+{]|\\[1-9gk]|\(\?[R&P(]")
_REPEAT = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\})")


def tokenizer_problem(text: str) -> str | None:
    """What in the content of a ``tokenizer.json`` is beyond its limit; None where nothing is.

    Whether it is a tokenizer at all, the library says.

    Example:
        >>> tokenizer_problem('{"padding": {"strategy": {"Fixed": 10000000000}}}')
        'its padding is 10000000000, expected 0 to 4096'

    """
    try:
        content = json.loads(text)
    except RecursionError:
        return "it nests too deep"
    except ValueError as error:
        return str(error)
    if not isinstance(content, dict):
        return "it is no table"
    for problem in _problems(content):
        return problem
    return None


def _problems(content: dict[str, Any]) -> Iterator[str]:
    for name in ("padding", "truncation"):
        for number in _numbers(content.get(name)):
            # The id of the padding token is a number of the vocabulary, and no length.
            if not 0 <= number <= MAX_TOKENS:
                yield f"its {name} is {number}, expected 0 to {MAX_TOKENS}"

    added = content.get("added_tokens") or []
    if len(added) > _MAX_ADDED:
        yield f"it has {len(added)} added tokens, expected at most {_MAX_ADDED}"
    for value in _values(added):
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            yield f"it has an added token of {len(value)} characters"

    words: list[dict[str, Any]] = []
    steps = [without_words(content.get(name), words) for name in _STEPS]
    if len(words) > _MAX_WORDS:
        yield f"it has {len(words)} words of embeddings, expected at most {_MAX_WORDS}"
    values = list(_values(steps))
    if len(values) > _MAX_PARTS:
        yield f"its steps have {len(values)} parts, expected at most {_MAX_PARTS}"
    replacements = 0
    for value in values:
        if not isinstance(value, dict):
            continue
        pattern = value.get("Regex")
        if isinstance(pattern, str) and _is_slow(pattern):
            yield f"its pattern {pattern[:80]!r} may take for ever"
        for inserted in (value.get("content"), value.get("prepend"), value.get("replacement")):
            if isinstance(inserted, str):
                replacements += 1
                if len(inserted) > _MAX_INSERTED:
                    yield f"it puts in {len(inserted)} characters for one"
    if replacements > _MAX_REPLACEMENTS:
        yield f"it replaces characters {replacements} times"


def without_words(value: Any, words: list[dict[str, Any]]) -> Any:
    """``value`` without the rules that stand for words of embeddings, which go to ``words``.

    Such a rule replaces a text by private characters. No other such rule replaces these, so a
    prompt grows by ``_MAX_VECTORS`` at most, however many rules there are.
    """
    if isinstance(value, list):
        kept = []
        for entry in value:
            if _is_word(entry):
                words.append(entry)
            else:
                kept.append(without_words(entry, words))
        return kept
    if isinstance(value, dict):
        return {name: without_words(entry, words) for name, entry in value.items()}
    return value


def _is_word(rule: Any) -> bool:
    """Whether a rule of the normaliser replaces a word by the vectors of an embedding."""
    if not isinstance(rule, dict) or rule.keys() != {"type", "pattern", "content"}:
        return False
    pattern = rule["pattern"]
    inserted = rule["content"]
    if rule["type"] != "Replace" or not isinstance(pattern, dict) or list(pattern) != ["String"]:
        return False
    word = pattern["String"]
    if not isinstance(word, str) or not isinstance(inserted, str):
        return False
    if not 1 <= len(word) <= _MAX_TEXT or not 1 <= len(inserted) <= _MAX_VECTORS:
        return False
    is_plain = not any(ord(letter) in PRIVATE for letter in word)
    return is_plain and all(ord(letter) in PRIVATE for letter in inserted)


def _numbers(table: Any) -> Iterator[float]:
    """The lengths in the table of padding or truncation."""
    if not isinstance(table, dict):
        return
    for name, value in table.items():
        if name in ("pad_id", "pad_type_id"):
            continue
        for part in _values(value):
            if isinstance(part, (int, float)):
                yield part


def _values(value: Any) -> Iterator[Any]:
    """Every value within ``value``, and it too."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        yield found
        if isinstance(found, dict):
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(found)


def _is_slow(pattern: str) -> bool:
    """Whether matching may take more than a power of the prompt's length."""
    if len(pattern) > _MAX_TEXT or _EXPONENTIAL.search(pattern):
        return True
    return any(len(_REPEAT.findall(part)) > _MAX_REPEATS for part in pattern.split("|"))
