"""A whole recipe with packs that two ranks share: exact resume after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_train.tracking.events import read_jsonl, read_steps
from tests.recipes.launching import children_of, finish, kill, start, wait_for
from tests.recipes.test_stage1 import end_hashes, overrides, run, trace

SHARED = "deepspeed.sequence_parallel=2"


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(corpus: Path, tmp_path: Path) -> None:
    run(overrides(corpus, tmp_path / "whole", SHARED), ranks=2)
    run_dir = tmp_path / "run"
    process = start("stage1_audio", overrides(corpus, run_dir, SHARED), ranks=2)
    wait_for(lambda: len(read_steps(run_dir / "events.jsonl")) >= 6, process)
    kill(children_of(process.pid)[-1])
    assert finish(process)[0] != 0
    run(overrides(corpus, run_dir, SHARED), ranks=2)
    resumes = [e for e in read_jsonl(run_dir / "events.jsonl") if e["kind"] == "resume"]
    assert [e["step"] for e in resumes] == [5]
    assert trace(run_dir) == trace(tmp_path / "whole")
    assert end_hashes(run_dir) == end_hashes(tmp_path / "whole")
