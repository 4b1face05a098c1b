"""Which weights a Talker stage starts from: Thinker and Talker of one run or of two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_train.config.errors import ConfigError
from omni_train.data.tokenizer import SPEAKER_TOKENS
from omni_train.engine.deepspeed import DeepSpeedConfig, Precision
from omni_train.models.config import ModelConfig
from omni_train.models.talker import OmniForTraining, TalkerForTraining
from omni_train.models.talker_build import (
    ThinkerUse,
    build_speech_model,
    build_thinker_replica,
    with_talker_from,
)
from omni_train.models.weights import SPEAKER_ROWS
from tests.numerics.talker_models import Models, make_models

PLAIN = DeepSpeedConfig(zero_stage=1, precision=Precision.fp32)
VOICES = {"a": SPEAKER_TOKENS[0], "new": SPEAKER_TOKENS[3]}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Models]:
    folder = tmp_path_factory.mktemp("omni")
    return folder, make_models(folder)


@pytest.fixture(scope="module")
def other(released: tuple[Path, Models], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sizes, all weights moved by one, and the trained row of a new speaker."""
    source, folder = released[0], tmp_path_factory.mktemp("other")
    stored = {name: value + 1 for name, value in load_file(source / "model.safetensors").items()}
    stored[SPEAKER_ROWS] = torch.full((1, 64), 7.0)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def config(thinker: Path, **values: object) -> ModelConfig:
    return ModelConfig(tokenizer="in memory", init_from=str(thinker), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("use", [ThinkerUse.frozen, ThinkerUse.cached])
def test_thinker_and_talker_of_two_runs(
    released: tuple[Path, Models], other: Path, use: ThinkerUse
) -> None:
    folder, models = released
    settings = with_talker_from(config(folder), str(other))
    model = build_speech_model(settings, models.tokenizer, PLAIN, seed=0, use=use)
    moved = models.talker.codec_head.weight + 1
    assert torch.equal(model.talker.codec_head.weight, moved)
    assert not model.report.initialised
    # The rows that the Talker reads are those of the Thinker that it will hear.
    table = models.upstream.thinker.get_input_embeddings().weight
    rows = table[list(model.talker.spec.row_ids)]
    assert torch.equal(model.talker.text_rows.weight, rows)
    assert model.spec == models.spec
    if use is ThinkerUse.cached:
        assert type(model) is TalkerForTraining
        replica = build_thinker_replica(settings, models.tokenizer, PLAIN, torch.device("cpu"))
        found = replica.thinker.get_input_embeddings().weight
    else:
        assert isinstance(model, OmniForTraining)
        assert not model.joint
        found = model.thinker.get_input_embeddings().weight
    assert torch.equal(found, table)


def test_without_a_talker_it_starts_afresh(released: tuple[Path, Models]) -> None:
    folder, models = released
    settings = with_talker_from(config(folder), "")
    model = build_speech_model(settings, models.tokenizer, PLAIN, seed=0, use=ThinkerUse.joint)
    assert isinstance(model, OmniForTraining)
    assert model.joint
    assert not torch.equal(model.talker.codec_head.weight, models.talker.codec_head.weight)
    assert {name.split(".")[0] for name in model.report.initialised} == {"talker"}


def test_a_trained_row_of_a_new_speaker_comes_along(
    released: tuple[Path, Models], other: Path
) -> None:
    """Its row is the Talker's own; cut out of the Thinker's table it would be the mean again."""
    folder, models = released
    settings = config(folder, speakers=VOICES, new_speakers=["new"])
    for source, trained in ((other, True), (folder, False)):
        chosen = with_talker_from(settings, str(source))
        model = build_speech_model(chosen, models.tokenizer, PLAIN, seed=0, use=ThinkerUse.cached)
        row = model.talker.rows()[model.talker.spec.speaker_row("new")]
        assert bool((row == 7.0).all()) == trained


def test_groups_that_the_config_names_stay_as_they_are(
    released: tuple[Path, Models], other: Path
) -> None:
    folder, _ = released
    settings = config(folder, init_groups={"codec_head": str(folder)})
    assert with_talker_from(settings, str(other)).init_groups == {
        "codec_head": str(folder),
        "talker": str(other),
        "talker_projection": str(other),
    }


def test_a_thinker_has_no_talker_to_give(released: tuple[Path, Models], tmp_path: Path) -> None:
    folder, models = released
    stored = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in stored.items() if not name.startswith("talker.")}
    save_file(kept, tmp_path / "model.safetensors")
    settings = with_talker_from(config(folder), str(tmp_path))
    with pytest.raises(ConfigError, match="expected tensors are missing: talker"):
        build_speech_model(settings, models.tokenizer, PLAIN, seed=0, use=ThinkerUse.frozen)
