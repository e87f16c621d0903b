"""The tokenizer in a GGUF file, from the one that transformers loads.

llama.cpp knows byte-level BPE, whose splitting of a text into words is named by a fixed list, and SentencePiece-like
BPE, which merges by scores. A tokenizer is recognised by its parts (those of the class that transformers takes, which
may differ from the file's), not by a hash of what it gives; one of other parts is refused, and the export's check
compares token ids of sample texts with transformers'.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from secateur.errors import refuse

_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: Final = {
    f"{_CONTRACTIONS}{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_CONTRACTIONS}{_WORDS}\\p{{N}}{_REST}": "qwen2",
}
"""Regular expressions that llama.cpp has under a name; GPT-2's is built into ``ByteLevel``."""
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE: Final = "\u2581"

SAMPLES: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces before, and\tsome\n\nnew lines  ",
    "def f(x): return {'a': x[0] ** 2, \"b\": 3.14159}",
    "We're sure they'll see it's 1234567 or 89,000.5!?",
    "Größe, naïve café, Жизнь, 你好世界, ไทย, 🙂👍🏽",
)
"""Texts whose token ids the check compares."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF fields.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (BPE by scores with byte fallback).
        splitting: name of the splitting into words, for ``gpt2``.
        tokens: by id.
        types: of the tokens, as GGUF numbers them.
        merges: of ``gpt2``.
        scores: of ``llama``.
        special: ids by GGUF's name (``bos``, ``eos``, ``unknown``, ``padding``).
        starts_with_bos: whether every text begins with the first special token.
        leading_space: whether a space goes before every text.
        template: chat template.
    """

    model: str
    splitting: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    starts_with_bos: bool
    leading_space: bool
    template: str | None

    def write(self, writer: Any, rows: int) -> None:
        """Add the fields; ids up to ``rows``, the height of the embedding, are filled with unused tokens."""
        padding = range(len(self.tokens), rows)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.splitting)
        writer.add_token_list([*self.tokens, *(f"[unused {i}]" for i in padding)])
        writer.add_token_types([*self.types, *(_UNUSED for _ in padding)])
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores([*self.scores, *(-1e6 for _ in padding)])
        for name, add in (
            ("bos", writer.add_bos_token_id),
            ("eos", writer.add_eos_token_id),
            ("unknown", writer.add_unk_token_id),
            ("padding", writer.add_pad_token_id),
        ):
            if name in self.special:
                add(self.special[name])
        writer.add_add_bos_token(self.starts_with_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.leading_space)
        if self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Args:
        tokenizer: as transformers loads it.
        rows: of the model's embedding.

    Raises:
        RequestError: llama.cpp would split or merge texts differently.
    """
    if not getattr(tokenizer, "is_fast", False):
        _refuse("it is not one that a tokenizer.json describes")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        _refuse(f"its model is {model.get('type')}, not BPE")
    if tokenizer.init_kwargs.get("add_eos_token") or _ends_with_special(tokenizer):
        _refuse("it puts a token behind every text")
    vocabulary: dict[str, int] = dict(model["vocab"])
    # classes add tokens of their own for which the model may have no row: nothing can make it read them
    added = [token for token in content.get("added_tokens") or [] if token["id"] < rows]
    vocabulary.update({token["content"]: token["id"] for token in added})
    count = max(vocabulary.values()) + 1
    if count > rows:
        _refuse(f"it has {count} tokens, the embedding {rows} rows")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    by_score = bool(model.get("byte_fallback"))
    tokens = [f"[unused {i}]" for i in range(count)]
    types = [_UNUSED] * count
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, _NORMAL
    if by_score:
        for index, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x"):
                types[index] = _BYTE
    for token in added:
        types[token["id"]] = _CONTROL if token["special"] else _USER
    special = {
        name: index
        for name, index in (
            ("bos", tokenizer.bos_token_id),
            ("eos", tokenizer.eos_token_id),
            ("unknown", tokenizer.unk_token_id),
            ("padding", tokenizer.pad_token_id),
        )
        if index is not None and index < rows
    }
    if by_score and "unknown" in special:
        types[special["unknown"]] = _UNKNOWN
    return Vocabulary(
        model="llama" if by_score else "gpt2",
        splitting="default" if by_score else _splitting(content),
        tokens=tokens,
        types=types,
        merges=[] if by_score else merges,
        scores=_scores(merges, vocabulary, count) if by_score else [],
        special=special,
        starts_with_bos=tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id],
        leading_space=by_score and _leading_space(content),
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _refuse(found: str) -> NoReturn:
    hint = "--no-tokenizer writes a file that takes token ids"
    refuse("tokenizer", "the tokenizer in llama.cpp", found, hint)


def _ends_with_special(tokenizer: Any) -> bool:
    return bool(tokenizer("a")["input_ids"][-1] in tokenizer.all_special_ids)


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a list of steps."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _splitting(content: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level tokenizer's splitting."""
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    normalizers = [step["type"] for step in _steps(content.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"}:  # llama.cpp leaves texts as they are; almost all texts are in NFC
        _refuse(f"it normalises texts ({', '.join(normalizers)})")
    last = steps[-1] if steps else {}
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space"):
        _refuse(f"its splitting into words ({', '.join(kinds) or 'none'}) is unknown to llama.cpp")
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and steps[0].get("behavior") == "Isolated":
        found = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if found:
            return found
    _refuse(f"its splitting into words is unknown to llama.cpp: {json.dumps(steps)[:200]}")


def _leading_space(content: dict[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before a text."""
    steps = _steps(content.get("normalizer"), "normalizers")
    pre = _steps(content.get("pre_tokenizer"), "pretokenizers")
    if [step["type"] for step in pre] == ["Metaspace"] and not steps:
        return bool(pre[0].get("prepend_scheme", "always") != "never")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if pre or steps not in ([replace], [prepend, replace]):
        _refuse(f"its treatment of spaces is unknown to llama.cpp: {json.dumps(steps + pre)[:200]}")
    return prepend in steps


def _scores(merges: list[str], vocabulary: dict[str, int], count: int) -> list[float]:
    """Scores that let the best merge come first: minus the rank of the first merge that gives the token."""
    scores = [-1e6] * count
    for rank, merge in reversed(list(enumerate(merges))):
        scores[vocabulary[merge.replace(" ", "", 1)]] = float(-rank)
    return scores
