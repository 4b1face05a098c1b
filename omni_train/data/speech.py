"""Spoken replies in the data worker: codes beside the dialogue, in one micro-batch for both models.

    bytes -> dialogue, codes [, reference] -> EncodedSample and SpokenReply -> TalkerLayout
          -> pack for the Thinker (or its cached states) and pack for the Talker = SpeechBatch

The text of a reference stands at the start of the assistant's turn, so the Thinker reads it as if
it had been said just before; its codes come before the codec bos (talker_layout.py). Not done
here: which samples, and which reference (speech_source.py); sums over weights (talker.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import DataError
from omni_train.data.chatml import SPEECH, split_reply
from omni_train.data.collate import collate
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch, read_member
from omni_train.data.split import joint_of
from omni_train.data.tokenizer import encode_text
from omni_train.data.types import EncodedSample, ModelSpec, ProcessingConfig, RawSample
from omni_train.data.work import Bad, PackMaker, PlannedSample
from omni_train.models.talker_layout import (
    SpeechBatch,
    SpokenReply,
    TalkerLayout,
    TalkerSpec,
    lay_out,
    pack_speech,
    spoken_reply,
)
from omni_train.models.talker_states import StateStore
from omni_train.speech.codec import parse_codes


@dataclass(frozen=True, slots=True)
class ReferenceSpeech:
    """Speech that a reply continues.

    Args:
        text: what it says.
        codes: int64 [A].
    """

    text: str
    codes: Tensor


@dataclass(frozen=True, slots=True)
class SpokenSample:
    """A dialogue and the reply in it that is spoken.

    Args:
        encoded: the whole dialogue, a reference's text in its last turn.
        reply: where the prompt, the reference's text and the reply's are, and the codes.
    """

    encoded: EncodedSample
    reply: SpokenReply


def encode_spoken(
    raw: RawSample,
    tokenizer: PreTrainedTokenizerFast,
    config: ProcessingConfig,
    spec: ModelSpec,
    *,
    codes: Tensor,
    reference: ReferenceSpeech | None = None,
) -> SpokenSample:
    """Return a dialogue whose last turn is spoken in the voice of its record's speaker.

    Args:
        raw: verified bytes and their index row.
        tokenizer, config, spec: as for `encode`.
        codes: int64 [K] of the reply; empty where it is yet to be sampled.
        reference: speech that the reply continues.

    Raises:
        DataError: as `encode` and `spoken_reply`.
    """
    num_reference_tokens = 0
    if reference is not None:
        num_reference_tokens = len(encode_text(tokenizer, reference.text))
        messages = _continued(raw.record["messages"], reference.text, raw.row.language)
        raw = RawSample(raw.row, {**raw.record, "messages": messages}, raw.media)
    encoded = encode(raw, tokenizer, config, spec)
    reply = spoken_reply(
        encoded,
        im_end=spec.tokens.im_end,
        speaker=raw.row.speaker,
        codes=codes,
        num_reference_tokens=num_reference_tokens,
        reference_codes=reference.codes if reference is not None else None,
    )
    return SpokenSample(encoded, reply)


def _continued(
    messages: Sequence[Mapping[str, Any]], before: str, language: str
) -> list[Mapping[str, Any]]:
    """Return a dialogue whose reply stands behind another text, each tokenised apart."""
    prompt, text = split_reply(messages)
    content = [
        {"type": "text", "text": before},
        {"type": SPEECH, SPEECH: "reference"},
        {"type": "text", "text": joint_of(language) + text},
    ]
    return [*prompt, {"role": "assistant", "content": content}]


def read_codes(raw: RawSample, num_codes: int) -> Tensor:
    """Return the codes int64 [K] of a sample that was fetched with them.

    Args:
        raw: bytes, those of the codes among them.
        num_codes: size of the model's codebook.

    Raises:
        DataError: `no_codes`; `bad_codes` where the file is none, or of another codec.
    """
    speech = raw.row.speech
    if speech is None or speech.member not in raw.media:
        raise DataError("no_codes", "the sample has no spoken reply with codes")
    codes = parse_codes(raw.media[speech.member], num_codes)
    if codes.numel() != speech.num_codes:
        raise DataError(
            "stale_index", f"{codes.numel()} codes, the index promises {speech.num_codes}"
        )
    return codes


def state_name(sample: PlannedSample) -> str:
    """Return the name of a sample's cached states: its key, and hashes of all that it is made of.

    So states of a sample that was changed since are not found.
    """
    row = sample.row
    media = (place.xxh3 for info in row.media for place in info.places())
    return "/".join((sample.source, sample.key, row.json_xxh3, *media))


@dataclass(frozen=True, slots=True)
class _Ready:
    """A sample of a pack, laid out; with the Thinker's states where they are kept."""

    encoded: EncodedSample
    layout: TalkerLayout
    states: Tensor | None

    @property
    def key(self) -> str:
        """Key of the sample."""
        return self.encoded.key


@dataclass(kw_only=True, slots=True)
class SpeechMaker(PackMaker):
    """Fetches, encodes and packs the spoken replies of a pack.

    Args:
        talker: ids, codes and speakers of the Talker.
        noise: share of a reference's codes that random ones replace.
        seed: of the noise, together with the sample's name and visit.
        states: where the Thinker's states are kept; without it the Thinker runs along, and the
            micro-batch holds its pack.
    """

    talker: TalkerSpec
    noise: float = 0.0
    seed: int = 0
    states: StateStore | None = None

    def _encode(self, sample: PlannedSample) -> _Ready:
        raw = fetch(sample.shard, sample.row, self.store, codes=True)
        spoken = encode_spoken(
            raw,
            self.tokenizer,
            self.config,
            self.spec,
            codes=read_codes(raw, self.talker.num_codes),
            reference=self._reference(sample),
        )
        layout = lay_out(spoken.reply, self.talker)
        if self.states is None:
            return _Ready(spoken.encoded, layout, None)
        num_tokens = spoken.encoded.num_tokens
        states = self.states.get(state_name(sample), num_tokens=num_tokens)
        if states is None:
            raise DataError("no_states", f"the cache holds none for {num_tokens} tokens")
        return _Ready(spoken.encoded, layout, states)

    def _reference(self, sample: PlannedSample) -> ReferenceSpeech | None:
        if sample.reference is None:
            return None
        speech = sample.reference.speech
        assert speech is not None, f"{sample.reference.key} is no spoken reply"
        place = (speech.offset, speech.size, speech.xxh3)
        data = read_member(sample.shard, *place, self.store)
        codes = parse_codes(data, self.talker.num_codes)
        if self.noise:
            name = f"{self.seed}:{sample.visit}:{state_name(sample)}"
            codes = _noisy(codes, self.noise, self.talker.num_codes, name)
        return ReferenceSpeech(speech.text, codes)

    def _collate(self, encoded: list[Any], bad: list[Bad]) -> SpeechBatch:
        ready: list[_Ready] = encoded
        lengths = [sample.encoded.num_tokens for sample in ready]
        talker = pack_speech([sample.layout for sample in ready], lengths, self.talker)
        keys = [sample.key for sample in ready]
        if self.states is None:
            thinker = collate([sample.encoded for sample in ready], self.spec)
            return SpeechBatch(talker=talker, thinker=thinker, keys=keys, bad=bad)
        states = [self.states.empty(), *(s.states for s in ready if s.states is not None)]
        return SpeechBatch(talker=talker, states=torch.cat(states), keys=keys, bad=bad)


def _noisy(codes: Tensor, share: float, num_codes: int, name: str) -> Tensor:
    """Return codes int64 [A] of which about a share are random; the same for the same name."""
    rng = np.random.default_rng(xxhash.xxh3_64_intdigest(name.encode()))
    drawn = torch.from_numpy(rng.integers(0, num_codes, codes.numel()))
    return torch.where(torch.from_numpy(rng.random(codes.numel()) < share), drawn, codes)
