"""The tokenizer of a .gguf file: its vocabulary, merges, special tokens and chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from shoal.workers.loading.gguf_file import GgufFile

# tokenizer.ggml.token_type
CONTROL, USER_DEFINED = 3, 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Pre:
    """How text is cut before merging."""

    split: str | None = None  # None: GPT-2's own expression
    digits: bool = False  # each digit alone, before anything else
    nfc: bool = False
    whole_words: bool = False  # a piece that is in the vocabulary is taken whole, merges or not
    bos: bool = False  # a BOS is added unless the file says no


_GPT2, _DIGITS = _Pre(), _Pre(digits=True)
_LLAMA3 = _Pre(_LLAMA3_SPLIT, whole_words=True, bos=True)
_QWEN2 = _Pre(_QWEN2_SPLIT, nfc=True)

# tokenizer.ggml.pre -> how. The names are llama.cpp's.
PRE_TOKENIZERS: dict[str, _Pre] = {
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo"), _GPT2),
    **dict.fromkeys(("smollm", "refact", "starcoder", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Pre(_LLAMA3_SPLIT)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _Pre(_TEKKEN_SPLIT, whole_words=True, bos=True),
}


def tokenizer_from_gguf(file: GgufFile) -> Any:
    """A transformers fast tokenizer with the file's ids, special tokens, BOS / EOS rules and chat template.

    Raises ValueError, naming the file, when it holds no tokenizer or one of a kind that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    kind, tokens = fields.get("model"), fields.get("tokens")
    if not tokens:
        raise ValueError(f"{file.path} holds no tokenizer: give tokenizer=, or skip_tokenizer_init=True")
    if kind == "gpt2":
        pre = _pre_tokenizer(file, fields.get("pre"))
        backend, adds_bos = _byte_level(fields, pre), pre.bos
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(fields), True
    else:
        raise ValueError(
            f"{file.path} holds a tokenizer of kind {kind!r}; only 'gpt2' and 'llama' are supported: give tokenizer="
        )
    _add_special(backend, tokens, fields.get("token_type", []))
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{name}_token": fields.get(f"{key}_token_id") for name, key in named.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=str(file.path),
        chat_template=_chat_template(file.metadata),
        model_max_length=int(file.metadata.get(f"{file.architecture}.context_length", 1 << 30)),
        clean_up_tokenization_spaces=False,
        add_bos_token=bool(fields.get("add_bos_token", adds_bos)) and ids["bos_token"] is not None,
        add_eos_token=bool(fields.get("add_eos_token", False)) and ids["eos_token"] is not None,
        **{name: tokens[index] for name, index in ids.items() if index is not None},
    )


def _pre_tokenizer(file: GgufFile, name: str | None) -> _Pre:
    if name is None and file.architecture == "gpt2":
        name = "gpt-2"
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.pre is {name!r}, and how it cuts text is not known here (known: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}): give the folder or hub id of the model's tokenizer as tokenizer="
        )
    return PRE_TOKENIZERS[name]


def _byte_level(fields: dict[str, Any], pre: _Pre) -> Tokenizer:
    """BPE over bytes, as GPT-2 introduced it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {token: index for index, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("merges", [])]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=pre.whole_words))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if pre.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: dict[str, Any]) -> Tokenizer:
    """SentencePiece BPE with byte fallback: merges follow from the scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = fields["tokens"], fields["scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[fields.get("unknown_token_id", 0)]
    merges = _merges_from_scores(vocab, scores)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(fields.get("add_space_prefix", True))
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score first."""
    found = []
    for token, index in vocab.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(vocab[left], vocab[right], left, right) for left, right in pairs if left in vocab and right in vocab]
        found += [(-scores[index], index, order, pair) for order, pair in enumerate(sorted(known))]
    return [(pair[2], pair[3]) for _, _, _, pair in sorted(found)]


def _add_special(backend: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Control tokens are never part of text; user-defined ones are text, but always whole."""
    from tokenizers import AddedToken

    marked = list(zip(tokens, kinds, strict=False))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in marked if k == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in marked if k == USER_DEFINED])


def _chat_template(metadata: dict[str, Any]) -> str | dict[str, str] | None:
    """The file's template; with named ones beside it, all of them by name."""
    default = metadata.get("tokenizer.chat_template")
    names = metadata.get("tokenizer.chat_templates", [])
    more = {name: metadata[key] for name in names if (key := f"tokenizer.chat_template.{name}") in metadata}
    return {"default": default, **more} if default and more else default
