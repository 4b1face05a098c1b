"""The plan command: what it fills in, how it prints at two widths, and a refit by a run."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from launch.cli import main
from launch.plan import missing_settings, plan_as_dict, refit_run
from launch.plan_report import launch_command, print_plan
from omni_train.config.errors import ConfigError
from omni_train.planning.constants import load_constants, load_hardware
from omni_train.planning.estimate import Options, Plan, plan_stage

OPTIONS = Options(devices=64, hardware=load_hardware("h100"), price=2.5, mtbf_device_hours=50_000.0)
VALUES: dict[str, Any] = {
    "run": {"dir": "runs/x", "seed": 0},
    "model": {"preset": "qwen2_5_omni_3b", "tokenizer": "none", "new_speakers": []},
    "optim": {"lr": 1e-4},
    "deepspeed": {"zero_stage": 3, "precision": "bf16"},
    "fit": {"max_steps": 1000, "save_steps": 100},
    "phase": "encoder",
    "data": {
        "sources": {"talks": {"path": "none", "weight": 1.0, "max_epochs": None}},
        "pack_tokens": 8192,
        "global_batch_packs": 64,
        "budget_tokens": None,
        "num_workers": 2,
    },
}


@functools.cache
def make_plan() -> Plan:
    return plan_stage("stage1_audio", VALUES, OPTIONS, load_constants(), root=Path("nowhere"))


@pytest.mark.parametrize("width", [80, 160])
def test_the_page_keeps_its_width_and_says_everything(width: int) -> None:
    out = io.StringIO()
    plan = make_plan()
    print_plan(
        plan,
        filled=["run.dir"],
        refit=None,
        command="COMMAND",
        console=Console(file=out, width=width, highlight=False),
    )
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for part in (
        "with values of your own for run.dir",
        "stage1_audio on 64 x h100",
        "sequence parallelism pass",
        "audio_encoder 635,048,960 trained",
        "llm 3,085,938,688 frozen",
        "static",
        "seconds per step",
        "MFU: 2, 4 or 6",
        "save every",
        "at 2.5 an hour",
        "COMMAND",
    ):
        assert part in words, part
    assert f"{plan.memory.total / 1e9:.1f} of 80 GB" in words


def test_json_of_the_command_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "stage1_audio", "phase=encoder", "model=qwen2_5_omni_7b", "--devices", "16"]
    code = main([*argv, "data.global_batch_packs=16", "data.pack_tokens=4096", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert code == (2 if any(f["status"] == "fail" for f in values["findings"]) else 0)
    assert values["setup"]["devices"] == 16
    assert "model.tokenizer" in values["filled_in"]
    parts = values["memory"]
    assert sum(v for k, v in parts.items() if k not in {"host", "total"}) == parts["total"]
    assert values["trained_parameters"] == 639_640_064
    assert all(entry["origin"] for entry in values["constants"].values())
    assert "recipes.stage1_audio" in values["launch_command"]


def test_bad_arguments_are_refused_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, said in (
        (["plan", "stage1_audoi"], "did you mean stage1_audio"),
        (["plan", "stage1_audio", "--devices", "0"], "above 0"),
        (["plan", "stage1_audio", "--price", "-1"], "above 0"),
    ):
        assert main(argv) == 2
        assert said in capsys.readouterr().err


def test_only_what_nothing_gives_is_filled_in() -> None:
    assert missing_settings("stage1_audio", ["experiment=stage1_audio/debug"]) == {}
    given = ["run.dir=runs/x", "+data=mixture_7b", "fit.max_steps=7"]
    missing = missing_settings("stage1_audio", given)
    assert list(missing) == ["model.tokenizer", "model.init_from"]
    whole = missing_settings("stage2_multimodal", ["model.init_from=runs/x"])
    assert whole["data.sources"] == "+data=mixture_7b"
    assert "model.init_from" not in missing_settings("text_lm", [])


def test_the_launch_command_starts_the_same_stage() -> None:
    plan = make_plan()
    assert "--nnodes=8 --nproc-per-node=8" in launch_command(plan, ["phase=encoder"])
    assert launch_command(plan, ["run.dir=a b"]).endswith("'run.dir=a b'")


def write_run(folder: Path, *, seconds: float, peak_mib: int, steps: int = 20) -> None:
    tokens = make_plan().totals.tokens / 1000
    events: list[dict[str, Any]] = [
        {"kind": "run_start", "stage": "stage1_audio_encoder", "ranks": 64}
    ]
    for number in range(1, steps + 1):
        # The first steps are slow and must not count.
        slow = 10.0 if number <= 5 else 1.0
        events.append(
            {
                "kind": "step",
                "step": number,
                "tokens": tokens,
                "seconds": {"data": 0.5, "forward": slow * seconds / 3, "backward": seconds / 1.5},
                "peak_rss_mib": peak_mib,
            }
        )
    events.append({"kind": "save", "seconds": 7.0})
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "events.jsonl").write_text(lines)
    (folder / "resolved.yaml").write_text(yaml.safe_dump(VALUES))


def test_a_run_twice_as_slow_doubles_the_plan(tmp_path: Path) -> None:
    plan, constants = make_plan(), load_constants()
    write_run(tmp_path, seconds=2 * plan.step.total, peak_mib=50_000)
    refit = refit_run(tmp_path, OPTIONS, constants)
    assert refit.slowdown == pytest.approx(2.0)
    assert refit.step_s == pytest.approx((plan.step.total, 2 * plan.step.total))
    assert refit.peak_bytes[1] == 50_000 * 2**20
    assert (refit.save_s, refit.data_s) == (7.0, 0.5)
    shown = plan_as_dict(plan, filled=[], refit=refit, command="")["refit"]
    assert shown["slowdown"] == refit.slowdown


def test_too_short_a_run_teaches_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run directory"):
        refit_run(tmp_path, OPTIONS, load_constants())
    write_run(tmp_path, seconds=1.0, peak_mib=1, steps=8)
    with pytest.raises(ConfigError, match="3 steps"):
        refit_run(tmp_path, OPTIONS, load_constants())
