"""The loader of a Talker stage: the plan of spoken replies, run.

Done here: putting source, worker and loader together, and the checks that need no sample. Not done
here: the parts (speech_source.py, speech.py, loader.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.loader import BYTES_PER_TOKEN, PlannedLoader, build_loader
from omni_train.data.source import ShardSource
from omni_train.data.speech import SpeechMaker
from omni_train.data.speech_config import SpeechDataConfig
from omni_train.data.speech_source import SpeechSource
from omni_train.data.stores import Store
from omni_train.data.types import ModelSpec
from omni_train.engine.run import Run
from omni_train.models.talker_layout import TalkerSpec
from omni_train.models.talker_states import StateStore
from omni_train.speech.codec import CODES_FILE

# Index tensors of the Talker's pack, for each position; positions count in tokens here.
BYTES_PER_POSITION = 80


def build_speech_loader(
    config: SpeechDataConfig,
    tokenizer: PreTrainedTokenizerFast,
    spec: ModelSpec,
    talker: TalkerSpec,
    run: Run,
    *,
    states: StateStore | None = None,
) -> PlannedLoader:
    """Return the loader of a Talker stage, which gives a `SpeechBatch` for each pack.

    Args:
        config: sources, both budgets, references, balance.
        tokenizer, spec: of the Thinker.
        talker: of the Talker.
        run: its rank, seed and ledger.
        states: where the Thinker's states are kept; without it the micro-batches hold dialogues.

    Raises:
        ConfigError: codes of another codec than the Talker's, or of two codecs.
    """
    make = SpeechMaker(
        tokenizer,
        config.processing,
        spec,
        Store(config.fetch),
        config.worker_memory_bytes,
        talker=talker,
        noise=config.reference_noise,
        seed=run.config.seed,
        states=states,
    )
    positions_per_token = -(-config.pack_positions // config.pack_tokens)
    state_bytes = states.bytes_per_token if states is not None else 0
    loader = build_loader(
        config,
        tokenizer,
        spec,
        run,
        source_type=SpeechSource,
        make=make,
        bytes_per_token=BYTES_PER_TOKEN + positions_per_token * BYTES_PER_POSITION + state_bytes,
    )
    _check_codecs(loader.sources, talker)
    return loader


def _check_codecs(sources: Sequence[ShardSource], talker: TalkerSpec) -> None:
    """Hold what the sets say of their codes to the model and to each other.

    `codes.json` is written where codes are added to a set; codes that came with a set have none.
    """
    seen: dict[str, str] = {}
    for source in sources:
        key = f"data.sources.{source.name}.path"
        if (found := _codec_of(source)) is None:
            continue
        size, name = found
        if size > talker.num_codes:
            raise ConfigError(
                key=key,
                value=source.root.location,
                rule=f"its codec has {size} codes, the Talker knows {talker.num_codes}",
                remedy="set model.tiny.num_codes, or add codes with the codec of this model",
            )
        seen[source.name] = name
        if len(set(seen.values())) > 1:
            raise ConfigError(
                key=key,
                value=source.root.location,
                rule=f"its codes are of another codec than those before: {seen}",
                remedy="add the codes of all sets with one codec",
            )


def _codec_of(source: ShardSource) -> tuple[int, str] | None:
    """Size and name of the codec that a set's codes are of; None where it does not say."""
    try:
        record = json.loads(source.root.read_all(CODES_FILE))
        return int(record["codebook_size"]), f"{record['codec']} {record['fingerprint']}"
    except DataError as error:
        if error.reason == "missing_shard":
            return None
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        place = f"{CODES_FILE} of {source.root.location}"
        raise DataError(
            "corrupt_codes_file", f"{place} is not what was written: {error}"
        ) from error
