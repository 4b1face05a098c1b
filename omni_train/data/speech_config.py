"""Settings of data with spoken replies: the Talker's budget, references, balance."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omni_train.config.errors import ConfigError, check_at_least
from omni_train.data.config import DataConfig

DEFAULT_MAX_REPEATS = 16


class ReferenceChoice(Enum):
    """What speech a spoken reply continues (RECIPE.md section 5, speech continuation).

    `same_speaker` takes another utterance of the same speaker in the same shard, another one each
    time the sample comes.
    """

    none = "none"
    same_speaker = "same_speaker"


class Balance(Enum):
    """What is sampled alike: with `words`, each word in the voice of each speaker."""

    none = "none"
    words = "words"


@dataclass(kw_only=True, slots=True)
class SpeechDataConfig(DataConfig):
    """What is read and packed where replies are spoken.

    Samples without codes are left out of the plan (`no_codes`), and with references those whose
    speaker has no other utterance in the shard (`no_reference`).

    Args:
        pack_positions: Talker positions of one packed sequence, beside `pack_tokens` of the
            Thinker: prompt, codes and, if there is one, the reference's codes.
        reference: what the speech continues; the loss reads the continuation alone.
        reference_noise: share of a reference's codes that are replaced by random ones, so that the
            voice is taken from it and not a pronunciation.
        balance: what is sampled alike, by repeating what is rare.
        max_repeats: how often a sample may come in one epoch; only with `balance`.
    """

    pack_positions: int = 8192
    reference: ReferenceChoice = ReferenceChoice.none
    reference_noise: float = 0.0
    balance: Balance = Balance.none
    max_repeats: int = DEFAULT_MAX_REPEATS

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        check_at_least(self, "data", pack_positions=1, max_repeats=1)
        if not 0.0 <= self.reference_noise <= 1.0:
            raise ConfigError(
                key="data.reference_noise",
                value=self.reference_noise,
                rule="a share is 0 to 1",
                remedy="use 0 for references as they are",
            )
        if self.reference_noise and self.reference is ReferenceChoice.none:
            raise ConfigError(
                key="data.reference_noise",
                value=self.reference_noise,
                rule="has no effect without references",
                remedy="set data.reference=same_speaker, or leave it out",
            )
        if self.max_repeats != DEFAULT_MAX_REPEATS and self.balance is Balance.none:
            raise ConfigError(
                key="data.max_repeats",
                value=self.max_repeats,
                rule="has no effect without data.balance",
                remedy="set data.balance=words, or leave it out",
            )
