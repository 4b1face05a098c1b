"""Stage 4 under ZeRO-3 on two ranks, and what becomes of it: adapters, export, evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5OmniForConditionalGeneration

from launch.local import child_environment
from launch.stages import REPO
from omni_train.config.errors import ConfigError
from omni_train.data.tokenizer import load_tokenizer, tokenizer_hash
from omni_train.export.probe import logits_hash, probe_logits
from omni_train.export.tensors import Layout, stored_name
from omni_train.export.write import ExportOptions, export
from omni_train.models.lora import is_adapter, plain_name
from omni_train.models.weights import CheckpointSource, SafetensorsSource, open_source
from omni_train.tracking.events import read_jsonl, read_steps
from tests.recipes.launching import finish, start
from tests.recipes.quickstart import NEW_TOKENS
from tests.whole_models import VOICE, save_base, write_dialogues

STEPS = 3


def overrides(root: Path, run_dir: Path, *extra: str) -> list[str]:
    return [
        f"run.dir='{run_dir}'",
        f"model.tokenizer='{root}/base/tokenizer'",
        f"model.init_from='{root}/base'",
        f"+data.sources={{dialogue: {{path: '{root}/dialogues'}}}}",
        "data.pack_tokens=512",
        "data.global_batch_packs=2",
        "data.num_workers=0",
        "data.processing.video_min_pixels=3136",
        "optim.lr=1e-3",
        f"fit.max_steps={STEPS}",
        "tracking.wandb=false",
        *extra,
    ]


def train(root: Path, name: str, *extra: str) -> Path:
    """Train on two ZeRO-3 ranks in bf16 and return the run directory."""
    run_dir = root / name
    code, output = finish(start("thinker_sft", overrides(root, run_dir, *extra), ranks=2))
    assert code == 0, output
    assert list(read_jsonl(run_dir / "ledger.jsonl")) == []
    assert len(read_steps(run_dir / "events.jsonl")) == STEPS
    return run_dir


def hashes(run_dir: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Group hashes before and after."""
    events = list(read_jsonl(run_dir / "events.jsonl"))
    kinds = {e["kind"]: e["hashes"] for e in events if e["kind"] in ("fit_start", "fit_end")}
    return kinds["fit_start"], kinds["fit_end"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in the released layout, and dialogues."""
    folder = tmp_path_factory.mktemp("sft")
    save_base(folder / "base", Layout.released)
    write_dialogues(folder / "dialogues")
    return folder


@pytest.fixture(scope="module")
def full(root: Path) -> Path:
    return train(root, "full", "+optim.groups={vision_encoder: {trainable: false}}")


@pytest.fixture(scope="module")
def adapted(root: Path) -> Path:
    # A rate that moves B away from zero within a few steps.
    more = ("lora.rank=4", "lora.alpha=8", "deepspeed.precision=fp32", "optim.lr=1e-2")
    return train(root, "adapted", *more, "optim.warmup_steps=0")


def reloaded_logits(folder: Path) -> dict[str, str]:
    """What a new process finds in an export: logits, a reply to a picture and a sound."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.quickstart", str(folder), VOICE],
        cwd=REPO,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_everything_but_what_is_switched_off_is_trained(full: Path) -> None:
    before, after = hashes(full)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"llm", "lm_head", "audio_encoder", "audio_projection", "vision_merger"}


def test_export_is_the_whole_model_bit_for_bit(root: Path, full: Path) -> None:
    lines: list[str] = []
    out = root / "export"
    options = ExportOptions(run=full, out=out, licence="apache-2.0", shard_bytes=600_000)
    digest = export(options, lines.append)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    # What the stage did not have is the base's, byte for byte, voices too.
    base, made = SafetensorsSource(str(root / "base")), SafetensorsSource(str(out))
    assert made.names() == base.names()
    run = CheckpointSource(str(max((full / "checkpoints").glob("step-*"))))
    for name in made.names():
        kept = base.tensor(name)
        wanted = run.tensor(name).to(torch.bfloat16) if name in run.names() else kept
        assert made.tensor(name).dtype == wanted.dtype
        assert torch.equal(made.tensor(name), wanted), name
    voices = torch.load(out / "spk_dict.pt", weights_only=True)
    theirs = torch.load(root / "base" / "spk_dict.pt", weights_only=True)
    assert torch.equal(voices[VOICE]["cond"], theirs[VOICE]["cond"])
    stored = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(name.startswith("thinker.visual.") for name in stored)
    # The card's quickstart, in a new process.
    found = reloaded_logits(out)
    assert found["logits"] == digest
    assert found["whole"] == found["thinker"]
    assert found["ids"] == found["ours"]
    assert len(found["ours"][1]) == NEW_TOKENS
    tokenizer = load_tokenizer(out)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(load_tokenizer(root / "base" / "tokenizer"))
    card = (out / "README.md").read_text()
    for text in ("license: apache-2.0", "thinker_sft", "Token2Wav was taken over", digest):
        assert text in card
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        export(options, lines.append)


def test_both_layouts_reload_alike(root: Path, full: Path) -> None:
    out = root / "current"
    digest = export(ExportOptions(run=full, out=out, layout=Layout.current), print)
    stored = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(name.startswith("thinker.model.visual.") for name in stored)
    assert not any(name.startswith("thinker.visual.") for name in stored)
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(
        out, dtype=torch.bfloat16, local_files_only=True
    )
    torch.set_num_threads(1)
    assert logits_hash(probe_logits(model.thinker.eval())) == digest
    assert stored_name("thinker.lm_head.weight", Layout.released) == "thinker.lm_head.weight"


def test_adapters_leave_the_weights_alone_and_merge(root: Path, adapted: Path) -> None:
    before, after = hashes(adapted)
    assert {name for name in before if before[name] != after[name]} == {"llm_lora"}
    out = root / "merged"
    export(ExportOptions(run=adapted, out=out), print)
    base = {n: t for n, t in _tensors(root / "base").items() if n.startswith("thinker.")}
    merged = _tensors(out)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    source = open_source(str(adapted))
    assert isinstance(source, CheckpointSource)
    raw = json.loads((source_folder(adapted) / "manifest.json").read_text())["params"]
    adapters = {plain_name(name.split(".lora_")[0]) for name in raw if is_adapter(name)}
    assert changed == {f"{name}.weight" for name in adapters}
    # peft itself, on the base, with the adapter files: unmerged, and merged by peft.
    from peft import PeftModel

    whole = Qwen2_5OmniForConditionalGeneration.from_pretrained(
        root / "base", dtype=torch.float32, local_files_only=True
    )
    plain = probe_logits(whole.thinker.eval())
    wrapped = PeftModel.from_pretrained(whole, out / "adapter").eval()
    unmerged = probe_logits(wrapped.base_model.model.thinker)
    theirs = probe_logits(wrapped.merge_and_unload().thinker)
    ours = Qwen2_5OmniForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, local_files_only=True
    )
    mine = probe_logits(ours.thinker.eval())
    assert (unmerged - plain).abs().max() > 1e-2
    # One product instead of two: fp32 rounding of another order.
    torch.testing.assert_close(mine, unmerged, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def source_folder(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    source = SafetensorsSource(str(folder))
    return {name: source.tensor(name) for name in source.names()}


@pytest.mark.slow
def test_scores_do_not_depend_on_ranks_or_on_the_day(root: Path, full: Path) -> None:
    """Generation and likelihood, three times: on one rank twice, and on two."""
    found: list[dict[str, Any]] = []
    for number, ranks in enumerate((1, 1, 2)):
        run_dir = root / f"evaluate-{number}"
        path = f"path: '{root}/dialogues'"
        tasks = (
            f"+tasks={{said: {{{path}, metric: exact_match, max_new_tokens: 8, batch_samples: 5}}, "
            f"letters: {{{path}, metric: choice_likelihood, batch_samples: 2}}}}"
        )
        code, output = finish(
            start(
                "evaluate",
                [
                    f"run.dir='{run_dir}'",
                    f"model.tokenizer='{root}/base/tokenizer'",
                    f"model.init_from='{full}'",
                    "model.tiny={text_width: 64, text_layers: 2, audio_width: 64, audio_layers: 1}",
                    "processing.video_min_pixels=3136",
                    "tracking.wandb=false",
                    tasks,
                ],
                ranks=ranks,
            )
        )
        assert code == 0, output
        events = [e for e in read_jsonl(run_dir / "events.jsonl") if e["kind"] == "evaluation"]
        texts = {t: (run_dir / f"predictions-{t}.jsonl").read_text() for t in ("said", "letters")}
        moving = ("time", "t", "elapsed_s", "at", "seq")
        found.append(
            {"texts": texts}
            | {e["task"]: {k: v for k, v in e.items() if k not in moving} for e in events}
        )
    assert found[0] == found[1] == found[2]
    assert set(found[0]["said"]["groups"]) == {"text", "image", "audio", "video"}
    assert found[0]["letters"]["decoding"] == "likelihood"
    rows = [json.loads(line) for line in found[0]["texts"]["letters"].splitlines()]
    assert {row["prediction"] for row in rows} <= set("ABCD")


def test_a_fresh_thinker_is_refused(root: Path, tmp_path: Path) -> None:
    code, output = finish(
        start("thinker_sft", overrides(root, tmp_path / "run", "model.init_from=''"), ranks=1)
    )
    assert code != 0
    assert "dialogues are taught to a pretrained Thinker" in output
