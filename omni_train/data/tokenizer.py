"""Tokenizers: a small byte-level BPE of our own, and Qwen2.5-Omni's when a directory holds it.

The special tokens carry the names of Qwen2.5-Omni's tokenizer, so that the same code reads a
released model and the tiny one. Nothing here renders dialogues; that is `chatml.py` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import xxhash
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError
from omni_train.data.types import SpecialTokens

# Field of SpecialTokens -> token, as in the released tokenizer's added tokens.
CHAT_TOKENS = {
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "audio": "<|AUDIO|>",
    "audio_bos": "<|audio_bos|>",
    "audio_eos": "<|audio_eos|>",
    "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>",
    "image": "<|IMAGE|>",
    "video": "<|VIDEO|>",
}
END_OF_TEXT = "<|endoftext|>"
# What the Talker reads from the Thinker's table: RECIPE.md section 3.
TTS_TOKENS = ("<|tts_pad|>", "<|tts_text_bos|>", "<|tts_text_eos|>")
SPEAKER_TOKENS = ("<|speaker_0|>", "<|speaker_1|>", "<|speaker_2|>", "<|speaker_3|>")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`; the same texts give the same tokenizer.

    Args:
        texts: plain text, without special tokens.
        vocab_size: largest number of ids in all, special tokens included; at least 300
            (256 bytes and the special tokens).
    """
    if vocab_size < 300:
        raise ConfigError(
            key="vocab_size",
            value=vocab_size,
            rule="a byte-level vocabulary holds 256 bytes and the special tokens",
            remedy="use at least 300",
        )
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, *CHAT_TOKENS.values(), *TTS_TOKENS, *SPEAKER_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=CHAT_TOKENS["im_end"], pad_token=END_OF_TEXT
    )


def rename_tokens(
    tokenizer: PreTrainedTokenizerFast, tokens: SpecialTokens
) -> PreTrainedTokenizerFast:
    """Return a Qwen2.5 tokenizer with the names of Qwen2.5-Omni's at the ids of `tokens`.

    The ids exist in Qwen2.5, some under names of their own (RECIPE.md section 4); its model has a
    row for each. Everything else stays.

    Args:
        tokenizer: Qwen2.5's, or one that has been renamed before.
        tokens: ids of the chat and media tokens.

    Raises:
        ConfigError: an id is no special token of this tokenizer, or a name stands at another id.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {entry["id"]: entry for entry in core["added_tokens"]}
    vocab = tokenizer.get_vocab()
    for name, token in CHAT_TOKENS.items():
        wanted = getattr(tokens, name)
        if wanted not in added or vocab.get(token, wanted) != wanted:
            raise ConfigError(
                key="tokenizer",
                value=tokenizer.name_or_path,
                rule=f"{token} belongs at id {wanted}, which is no special token of it"
                if wanted not in added
                else f"{token} stands at {vocab[token]} and belongs at {wanted}",
                remedy="give the tokenizer of Qwen2.5",
            )
        added[wanted]["content"] = token
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)),
        eos_token=CHAT_TOKENS["im_end"],
        pad_token=END_OF_TEXT,
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer directory (`tokenizer.json` and its config); never from the network.

    Raises:
        ConfigError: the directory has no `tokenizer.json`.
    """
    if not (Path(path) / "tokenizer.json").is_file():
        raise ConfigError(
            key="model.tokenizer",
            value=str(path),
            rule="a directory with tokenizer.json is needed",
            remedy="give a saved tokenizer, such as the demo's runs/demo/corpus/tokenizer",
        )
    return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of plain text; what looks like a special token in it is encoded as ordinary text."""
    core = tokenizer.backend_tokenizer
    # A transcript that spells "<|im_end|>" must stay text: special ids come from chatml.py only.
    core.encode_special_tokens = True
    ids: list[int] = core.encode(text, add_special_tokens=False).ids
    return ids


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """xxh3-64 of the tokenizer's whole definition; another hash means other token counts."""
    return str(xxhash.xxh3_64_hexdigest(tokenizer.backend_tokenizer.to_str().encode()))


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> SpecialTokens:
    """Look the chat and media ids up by name.

    Raises:
        ConfigError: the tokenizer lacks one of them (Qwen2.5's own must be extended first).
    """
    vocab = tokenizer.get_vocab()
    missing = [token for token in CHAT_TOKENS.values() if token not in vocab]
    if missing:
        raise ConfigError(
            key="model.tokenizer",
            value=tokenizer.name_or_path,
            rule=f"these special tokens are missing: {', '.join(missing)}",
            remedy="use Qwen2.5-Omni's tokenizer, or one made by train_tokenizer",
        )
    return SpecialTokens(**{name: vocab[token] for name, token in CHAT_TOKENS.items()})
