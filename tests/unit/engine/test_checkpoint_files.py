"""Manifests, verification of every byte, retention, and reading ranges across rank files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from omni_train.engine import checkpoint_files as files
from omni_train.engine.checkpoint import rng_state, set_rng_state
from omni_train.engine.checkpoint_files import CheckpointError, Manifest
from omni_train.engine.checkpoint_reader import CheckpointReader, slice_key

WEIGHT = torch.arange(35, dtype=torch.float32)
FROZEN = torch.arange(9).to(torch.bfloat16)
CUTS = (0, 12, 13, 35)


def write_step(root: Path, step: int, *, frozen: str = "frozen-aa") -> Path:
    """A checkpoint of three ranks: `w` of shape [5, 7] in uneven slices, `f` frozen on one."""
    home = root / frozen
    if not home.exists():
        home.mkdir(parents=True)
        save_file({slice_key("frozen", "f", 0): FROZEN}, str(home / "rank-00000.safetensors"))
    folder = files.new_temporary(root, f"step-{step}")
    for rank in range(3):
        start, stop = CUTS[rank], CUTS[rank + 1]
        part = {slice_key("master", "w", start): WEIGHT[start:stop].clone()}
        save_file(part, str(folder / files.rank_file(rank, "safetensors")))
    (folder / "state.json").write_text(json.dumps({"step": step}))
    Manifest(
        step=step,
        world_size=3,
        fingerprint={"git": "abc"},
        files={path.name: files.record_of(path) for path in folder.iterdir()},
        frozen=frozen,
        frozen_files={path.name: files.record_of(path) for path in home.iterdir()},
        params={
            "w": {"shape": [5, 7], "trainable": True, "dtype": "bfloat16"},
            "f": {"shape": [3, 3], "trainable": False, "dtype": "bfloat16"},
        },
    ).write(folder)
    files.put_in_place(folder, root / f"step-{step}")
    files.point_to(root, f"step-{step}")
    return root / f"step-{step}"


def test_reader_returns_any_range_across_rank_files(tmp_path: Path) -> None:
    reader = CheckpointReader(write_step(tmp_path / "checkpoints", 3))
    assert reader.names() == ["f", "w"]
    assert torch.equal(reader.full("w"), WEIGHT.view(5, 7))
    full = reader.full("f")
    assert full.dtype is torch.bfloat16
    assert torch.equal(full, FROZEN.view(3, 3))
    for start in range(35):
        for stop in range(start + 1, 36):
            found = reader.range("w", start, stop, kind="master")
            assert torch.equal(found, WEIGHT[start:stop])
    with pytest.raises(CheckpointError, match=r"lacks elements \[35, 36\)"):
        reader.range("w", 30, 36, kind="master")
    with pytest.raises(CheckpointError, match="no parameter x"):
        reader.full("x")


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    folder = write_step(root, 1)
    assert files.verify_checkpoint(folder) == []
    generator = random.Random(0)
    targets = [p for home in (folder, root / "frozen-aa") for p in home.iterdir()]
    for _ in range(200):
        path = generator.choice(targets)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[generator.randrange(len(bad))] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(bad))
        problems = files.verify_checkpoint(folder)
        whitespace = path.name == files.MANIFEST and json_equal(bytes(bad), good)
        assert [p.file for p in problems] == ([] if whitespace else [path.name])
        path.write_bytes(good)


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


def test_ranks_share_the_verification(tmp_path: Path) -> None:
    folder = write_step(tmp_path / "checkpoints", 1)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    shares = [files.verify_checkpoint(folder, share=r, shares=2) for r in range(2)]
    assert sorted(p.file for share in shares for p in share) == [
        files.rank_file(rank, "safetensors") for rank in range(3)
    ]
    assert {p.reason for share in shares for p in share} == {"missing"}


@pytest.mark.parametrize("milestone", [0, 3])
def test_retention_never_leaves_a_run_without_a_complete_checkpoint(
    tmp_path: Path, milestone: int
) -> None:
    generator = random.Random(1)
    for trial in range(20):
        root = tmp_path / str(trial) / "checkpoints"
        complete: list[int] = []
        for step in range(1, 12):
            write_step(root, step, frozen=f"frozen-{step % 2}")
            if generator.random() < 0.4:  # a save that a crash cut short, under any name
                (root / f"step-{step}" / files.MANIFEST).unlink()
            else:
                complete.append(step)
            keep = generator.choice([0, 1, 2, 3])
            files.prune(root, keep=keep, milestone_steps=milestone)
            newest = complete[-max(1, keep) :]
            complete = [s for s in complete if s in newest or (milestone and s % milestone == 0)]
            left = [int(p.name[5:]) for p in files.step_folders(root)]
            assert set(complete) <= set(left)
            for kept in complete:
                assert files.verify_checkpoint(root / f"step-{kept}") == []


def test_order_is_by_step_and_leftovers_are_moved(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (9, 10, 100):
        write_step(root, step)
    assert [path.name for path in files.step_folders(root)] == ["step-100", "step-10", "step-9"]
    assert (root / files.LATEST).read_text() == "step-100\n"
    files.new_temporary(root, "step-101")
    assert len(files.quarantine_leftovers(root)) == 1
    assert [p.name[:13] for p in (tmp_path / "quarantine").iterdir()] == ["step-101.tmp-"]
    write_step(root, 100)  # the same step again: the old one is moved, not lost
    assert len(list((tmp_path / "quarantine").iterdir())) == 2


def test_random_state_survives_json() -> None:
    state = json.loads(json.dumps(rng_state()))

    def draw() -> list[float]:
        import numpy as np

        return [random.random(), float(np.random.standard_normal()), float(torch.rand(()))]

    set_rng_state(state)
    first = draw()
    set_rng_state(state)
    assert draw() == first
