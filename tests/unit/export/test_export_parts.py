"""Parts of an export without a run: names, shards, rows, the card, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch.cli import main
from omni_train.config.errors import ConfigError
from omni_train.data.chatml import CHAT_TEMPLATE
from omni_train.data.types import ProcessingConfig
from omni_train.engine.deepspeed import Precision
from omni_train.export.card import Card, format_card
from omni_train.export.facts import Lineage, RunFacts, read_facts, read_lineage, scores_of
from omni_train.export.processor import load_processor, write_processor
from omni_train.export.tensors import (
    Layout,
    choose_parts,
    stored_name,
    with_rows,
    write_parts,
)
from omni_train.models.config import ModelConfig
from omni_train.models.talker_layout import TalkerSpec
from omni_train.models.weights import SafetensorsSource, canonical_name
from tests.numerics.samples import small_config, small_tokenizer


class Held:
    """Tensors by name, as a source of weights."""

    def __init__(self, path: str, tensors: dict[str, Tensor]) -> None:
        self.path, self._tensors = path, tensors

    def names(self) -> set[str]:
        return set(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


NAMES = (
    "thinker.lm_head.weight",
    "thinker.model.audio_tower.conv1.weight",
    "thinker.model.visual.merger.mlp.0.bias",
    "thinker.model.language_model.layers.0.mlp.up_proj.weight",
    "talker.model.norm.weight",
    "token2wav.code2wav_dit_model.x",
)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("name", NAMES)
def test_names_come_back(name: str, layout: Layout) -> None:
    assert canonical_name(stored_name(name, layout)) == name


def test_parts_come_from_the_run_or_else_from_the_base(tmp_path: Path) -> None:
    run = Held("run", {NAMES[0]: torch.full((4, 4), 1.001), NAMES[1]: torch.ones(2)})
    carried = torch.arange(6, dtype=torch.float64)
    base = Held("base", {NAMES[0]: torch.zeros(4, 4), NAMES[5]: carried})
    wanted = (NAMES[0], NAMES[1], NAMES[5])
    parts = choose_parts(wanted, run, base, dtype=torch.bfloat16, spec=None)
    write_parts(parts, tmp_path, layout=Layout.released, shard_bytes=40)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 16 * 2 + 2 * 2 + 6 * 8
    assert "thinker.audio_tower.conv1.weight" in index["weight_map"]
    made = SafetensorsSource(str(tmp_path))
    assert made.tensor(NAMES[0]).dtype == torch.bfloat16
    assert torch.equal(made.tensor(NAMES[0]), torch.full((4, 4), 1.001).bfloat16())
    assert torch.equal(made.tensor(NAMES[5]), carried)
    with pytest.raises(ConfigError, match=r"1 tensors are neither .*talker\.model\.norm"):
        choose_parts([*wanted, NAMES[4]], run, base, dtype=torch.bfloat16, spec=None)


def test_rows_of_the_talker_go_back_into_the_table() -> None:
    spec = TalkerSpec(
        codec_pad=0,
        codec_bos=1,
        codec_eos=2,
        codec_mask=3,
        num_codes=4,
        vocab_size=8,
        row_ids=(5, 3, 7),
        num_new_speakers=1,
        speakers={"new": 7},
    )
    rows = {
        "talker.text_rows.weight": torch.tensor([[5.0], [3.0]]),
        "talker.speaker_rows.weight": torch.tensor([[7.0]]),
    }
    table = with_rows(torch.zeros(9, 1, dtype=torch.bfloat16), Held("run", rows), spec)
    assert table[:, 0].tolist() == [0, 0, 0, 3, 0, 5, 0, 7, 0]


def facts(path: Path, stage: str) -> RunFacts:
    return RunFacts(
        path=path,
        stage=stage,
        step=7,
        model=ModelConfig(tokenizer="t"),
        precision=Precision.bf16,
        processing=ProcessingConfig(),
        data={"talks": "abc123"},
        code="0123456789abcdef",
        parents=(),
    )


def test_the_card_says_where_it_comes_from_and_how_it_scored(tmp_path: Path) -> None:
    score = {"task": "qa", "metric": "choice", "value": 0.5, "low": 0.4, "high": 0.6}
    how = {"num_samples": 10, "decoding": "greedy", "system": "", "max_new_tokens": 16}
    lineage = Lineage((facts(tmp_path, "thinker_sft"),), ("Qwen/Qwen2.5-Omni-7B",))
    card = Card(
        name="mine",
        licence="apache-2.0",
        lineage=lineage,
        scores=[score | how],
        carried={},
        audio=False,
        codec="",
        logits="feed",
        default_speaker="",
    )
    text = format_card(card)
    assert text.startswith("---\nlicense: apache-2.0\n")
    assert "- Qwen/Qwen2.5-Omni-7B" in text
    assert "| thinker_sft | 7 | bf16 | talks `abc123` | `0123456789ab` |" in text
    assert "| qa | choice | 0.5 | 0.4 to 0.6 | 10 | decoding greedy, max_new_tokens 16 |" in text
    assert "no Talker" in text
    assert "`feed`" in text


def test_processor_files_are_read_without_torchvision(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    _, spec = small_config(tokenizer)
    processing = ProcessingConfig(image_max_pixels=200_000)
    write_processor(tmp_path, tokenizer, processing, spec)
    processor = load_processor(tmp_path)
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert processor.tokenizer.image_token_id == spec.tokens.image
    assert processor.tokenizer.chat_template == CHAT_TEMPLATE
    assert processor.image_processor.size["longest_edge"] == 200_000
    assert processor.image_processor.patch_size == spec.patch_size
    assert processor.feature_extractor.feature_size == spec.num_mel_bins


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"no resolved\.yaml"):
        read_facts(tmp_path)
    (tmp_path / "resolved.yaml").write_text("run: {dir: x}\n")
    with pytest.raises(ConfigError, match="no run of a training stage"):
        read_lineage(tmp_path)
    with pytest.raises(ConfigError, match="no evaluation event"):
        scores_of(tmp_path)
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "resolved.yaml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
