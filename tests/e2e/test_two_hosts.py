"""Two hosts with a network of their own: rendezvous and ZeRO-3 steps across them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.local import child_environment
from launch.stages import REPO
from omni_train.tracking.events import read_jsonl, read_steps

HOSTS = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces that are joined by one cable."""
    tag = uuid.uuid4().hex[:6]
    names = [f"a-{tag}", f"b-{tag}"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", f"v0{tag}", "netns", names[0], "type", "veth", "peer", "name",
           f"v1{tag}", "netns", names[1])  # fmt: skip
        for number, name in enumerate(names):
            device = f"v{number}{tag}"
            ip("-n", name, "addr", "add", f"{HOSTS[number]}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_two_hosts_train_together(hosts: list[str], corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tag = hosts[0].removeprefix("a-")
    processes = []
    for number, name in enumerate(hosts):
        command = [
            *("ip", "netns", "exec", name, sys.executable, "-m", "launch.node", "--nodes", "2"),
            *("--node", str(number), "--ranks", "1", "--endpoint", f"{HOSTS[0]}:29511"),
            *("--job", "hosts", "--address", HOSTS[number], "--interface", f"v{number}{tag}"),
            *("--run-dir", str(run_dir), "recipes.text_lm", "experiment=text_lm/debug"),
            *(f"run.dir={json.dumps(str(run_dir))}", f"model.tokenizer='{corpus}/tokenizer'"),
            *(f"data.sources.text.path='{corpus}/train/text'", "fit.max_steps=3"),
        ]
        processes.append(
            subprocess.Popen(command, cwd=REPO, env={**os.environ, **child_environment(ranks=2)})
        )
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    events = list(read_jsonl(run_dir / "events.jsonl"))
    assert next(e for e in events if e["kind"] == "run_start")["ranks"] == 2
    assert len(read_steps(run_dir / "events.jsonl")) == 3
    assert json.loads((run_dir / "state.json").read_text())["status"] == "done"
