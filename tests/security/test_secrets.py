"""Canaries planted in arguments, environment, settings and addresses are found in no file."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from omni_train.config.errors import DataError
from omni_train.config.recipe import end_with
from omni_train.engine.fingerprint import redact, redact_text
from omni_train.engine.run import RunConfig, log, start_run
from omni_train.tracking.config import TrackingConfig

BY = {
    "argv": "canary-argv-4711",
    "env": "canary-env-4711",
    "name": "canary-name-4711",
    "user": "canary-user-4711",
    "query": "canary-query-4711",
}
ADDRESS = f"https://me:{BY['user']}@host.example/set?X-Signature={BY['query']}"


@dataclass(kw_only=True, slots=True)
class Settings:
    hub_token: str = BY["name"]
    path: str = ADDRESS
    note: str = f"uses {BY['env']} here"
    sources: dict[str, list[str]] = field(default_factory=lambda: {"a": [ADDRESS]})


def run_into(folder: Path, error: Exception) -> None:
    """A run with a W&B view that logs an address and then fails."""
    config, view = RunConfig(dir=str(folder)), TrackingConfig(wandb=True)
    with start_run(config, stage="toy", settings=Settings(), tracking=view) as run:
        log.info("reading %s", ADDRESS)
        run.event("hello", value=1)
        raise error


def test_no_canary_is_in_any_file_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", f"--token={BY['argv']}"])
    monkeypatch.setenv("WANDB_API_KEY", BY["env"])
    error = DataError("unreachable", f"gave up on {ADDRESS} with {BY['env']}")
    with pytest.raises(DataError):
        run_into(tmp_path / "run", error)
    with pytest.raises(SystemExit):
        end_with(error)
    output = "".join(capsys.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"events.jsonl", "state.json", "rank-00000.log"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for how, canary in BY.items():
        assert canary not in output, how
        holders = [path for path in files if canary.encode() in path.read_bytes()]
        assert holders == [], how


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "short")
    monkeypatch.setenv("MY_TOKENIZER", "a-long-enough-value")
    for text in ("a short text", "a-long-enough-value", "s3://bucket/a/b.tar", "mail me@host", ""):
        assert redact_text(text) == text
    settings = {"num_tokens": 5, "path": "https://host/a?b=c", "on": True}
    assert redact(settings) == {"num_tokens": 5, "path": "https://host/a?***", "on": True}
