"""Speech for the replies of many dialogues, on plain replicas of Thinker and Talker.

    checkpoint -> Replicas, once a process
    dialogue -> Thinker, one dialogue a pack -> SpeechRequest -> codes (sampling.py) -> wave (codec)

Dealt over any number of ranks, a reply gets the same codes: its states come from a pack of its own,
its noise from its key, and on a CPU `one_thread` keeps sums in one order. `speak` is for many
replies, `stream_wave` for one that is heard while it is sampled.

Not done here: reading shards, scoring (evaluation), choosing the text of a reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omni_train.data.collate import collate
from omni_train.data.types import EncodedSample
from omni_train.engine.deepspeed import Precision
from omni_train.models.build import build_replica, build_talker_replica, by_model
from omni_train.models.config import ModelConfig
from omni_train.models.talker import Talker, thinker_states
from omni_train.models.talker_layout import SpokenReply, lay_out
from omni_train.models.thinker import ThinkerForTraining
from omni_train.speech.codec import Codec, Speaker
from omni_train.speech.sampling import (
    SampledSpeech,
    SamplingConfig,
    SpeechRequest,
    sample_codes,
    speech_request,
    stream_codes,
)

# Samples of one call, in slots: enough that the last ones of a call leave few slots idle.
_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Replicas:
    """Plain models of one device, in eval mode; never ZeRO-3's."""

    thinker: ThinkerForTraining
    talker: Talker


@dataclass(slots=True)
class Utterance:
    """A reply to be spoken, in its dialogue.

    Args:
        key: names the noise; unique among all utterances of a job.
        sample: the dialogue with the reply.
        reply: where the reply stands in it, and in which voice; without codes.
    """

    key: str
    sample: EncodedSample
    reply: SpokenReply


def load_replicas(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    precision: Precision,
    device: torch.device,
) -> Replicas:
    """Read both models from a checkpoint, tensor by tensor, straight into replicas.

    Args:
        config: `init_from` is a run of `talker_icl`, a checkpoint, or a released directory;
            `init_groups` may name groups of both models.
        tokenizer: the model's.
        precision, device: of both.

    Raises:
        ConfigError: a tensor is missing, or of another shape.
    """
    thinker, talker = by_model(config)
    return Replicas(
        build_replica(thinker, tokenizer, precision, device),
        build_talker_replica(talker, tokenizer, precision, device),
    )


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute with one thread on a CPU, so that one rank rounds as each of several does.

    A rank alone on a machine has more threads than one that shares it, and sums in another order.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def make_request(replicas: Replicas, utterance: Utterance) -> SpeechRequest:
    """Run the Thinker over one dialogue and return what the Talker samples from.

    Raises:
        DataError: what `lay_out` finds: `empty_reply`, `unknown_speaker`, `short_reference`.
    """
    layout = lay_out(utterance.reply, replicas.talker.spec)
    device = replicas.talker.codec_head.weight.device
    batch = collate([utterance.sample], replicas.thinker.spec).to(device)
    states = thinker_states(replicas.thinker, batch)
    return speech_request(replicas.talker, utterance.key, states, layout)


def speak(
    replicas: Replicas, utterances: Iterable[Utterance], config: SamplingConfig
) -> Iterator[list[SampledSpeech]]:
    """Yield `num_samples` samples of each utterance, in order; the Thinker runs once for each.

    Args:
        replicas: of this rank.
        utterances: this rank's share; read as needed, so a job of any size fits in memory.
        config: how codes are drawn.
    """
    waiting = iter(utterances)
    together = max(1, _ROUNDS * config.num_slots // config.num_samples)
    while requests := [make_request(replicas, one) for one in islice(waiting, together)]:
        yield from sample_codes(replicas.talker, requests, config)


def to_wave(codec: Codec, codes: list[int], voice: Speaker | None = None) -> Tensor:
    """Return the wave float32 [S] of sampled codes; empty where none was sampled."""
    if not codes:
        return torch.empty(0)
    return codec.decode(torch.tensor(codes), voice)


def stream_wave(
    replicas: Replicas,
    utterance: Utterance,
    config: SamplingConfig,
    codec: Codec,
    voice: Speaker | None = None,
) -> Iterator[Tensor]:
    """Yield pieces of one reply's wave while its codes are drawn.

    The codes are those of sample 0 of `speak` with one slot: with more, sums may round differently.
    """
    alone = replace(config, num_samples=1, num_slots=1)
    request = make_request(replicas, utterance)
    events = stream_codes(replicas.talker, [request], alone)
    codes = (torch.tensor([event.code]) for event in events if event.code is not None)
    yield from codec.stream(codes, voice)
