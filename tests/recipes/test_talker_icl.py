"""Stage 5 under ZeRO-3 on two ranks: what learns, what does not, resume, caching, re-alignment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import recipes.talker_icl  # noqa: F401  registers its root
from omni_train.config.errors import ConfigError
from omni_train.config.load import compose_config
from omni_train.config.register import find_root
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import Precision
from omni_train.export.write import ExportOptions, export
from omni_train.models.build import build_talker_replica
from omni_train.models.config import ModelConfig
from omni_train.models.weights import SafetensorsSource, open_source
from omni_train.speech.mel_kmeans import CODEC_DIR, MelKMeansCodec, MelKMeansConfig
from omni_train.tracking.events import read_jsonl, read_steps
from tests.numerics.talker_models import make_models
from tests.recipes.launching import children_of, finish, kill, start, wait_for
from tests.speech_sets import VOICES, some_samples, write_set

STEPS = 10
TALKER = {"talker", "talker_projection", "codec_head"}
NAMES = dict(zip(VOICES, ("en-us", "en-us+m3"), strict=True))
SIZES = {
    **{f"{part}_width": 64 for part in ("text", "audio", "vision")},
    **dict.fromkeys(("text_layers", "vision_layers", "talker_layers"), 2),
    "audio_layers": 1,
    "talker_width": 128,
    "num_codes": 96,
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Thinker, its tokenizer, and 64 spoken replies."""
    root = tmp_path_factory.mktemp("given")
    models = make_models(root / "omni")
    models.tokenizer.save_pretrained(root / "tokenizer")
    samples = some_samples(64)
    write_set(root / "spoken", samples, models.tokenizer)
    for sample in samples:
        sample.record["speaker"] = NAMES[sample.record["speaker"]]
    write_set(root / "named", samples, models.tokenizer)
    return root


def overrides(given: Path, run_dir: Path, *extra: str) -> list[str]:
    sizes = ", ".join(f"{name}: {size}" for name, size in SIZES.items())
    return [
        f"run.dir='{run_dir}'",
        f"model.tokenizer='{given}/tokenizer'",
        f"model.init_from='{given}/omni'",
        f"model.tiny={{{sizes}}}",
        f"+data.sources={{spoken: {{path: '{given}/spoken'}}}}",
        "data.pack_tokens=512",
        "data.pack_positions=512",
        "data.global_batch_packs=4",
        "data.num_workers=0",
        "optim.lr=3e-3",
        f"fit.max_steps={STEPS}",
        "fit.save_steps=5",
        "tracking.wandb=false",
        *extra,
    ]


def run(recipe_overrides: list[str], *, ranks: int = 2) -> None:
    code, output = finish(start("talker_icl", recipe_overrides, ranks=ranks))
    assert code == 0, output


def trace(run_dir: Path) -> list[tuple[Any, ...]]:
    return [
        (e["step"], e["loss"], e["keys"], e["grad_norm"], e["target_tokens"])
        for e in read_steps(run_dir / "events.jsonl")
    ]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_jsonl(run_dir / "events.jsonl") if e["kind"] == kind]


def changed_groups(run_dir: Path) -> set[str]:
    before = events(run_dir, "fit_start")[0]["hashes"]
    after = events(run_dir, "fit_end")[-1]["hashes"]
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if after[name] != value}


CONTINUED = (
    "data.reference=same_speaker",
    "data.reference_noise=0.1",
    "data.balance=words",
)


@pytest.fixture(scope="module")
def whole(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten uninterrupted bf16 steps on two ranks, with every switch of the data on."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(overrides(given, run_dir, *CONTINUED))
    return run_dir


def test_export_carries_the_talker_and_what_turns_its_codes_into_sound(
    given: Path, whole: Path, tmp_path: Path
) -> None:
    """With the base's Token2Wav, or with a codec of our own beside it."""
    frames = MelKMeansConfig(frame_rate_hz=25, codebook_size=4)
    centroids = torch.zeros(4, 96, dtype=torch.int16)
    MelKMeansCodec(frames, centroids).save(tmp_path / "codec" / CODEC_DIR)
    tokenizer = load_tokenizer(given / "tokenizer")
    for name, codec in (("theirs", ""), ("ours", str(tmp_path / "codec"))):
        out = tmp_path / name
        export(ExportOptions(run=whole, out=out, codec=codec, verify=False), print)
        made, base = SafetensorsSource(str(out)), SafetensorsSource(str(given / "omni"))
        run_weights = open_source(str(whole))
        talker = {n for n in made.names() if n.startswith("talker.")}
        assert talker == {n for n in base.names() if n.startswith("talker.")}
        for tensor in talker:
            trained = run_weights.tensor(tensor).to(torch.bfloat16)
            assert torch.equal(made.tensor(tensor), trained), tensor
        settings = json.loads((out / "config.json").read_text())
        card = (out / "README.md").read_text()
        decoder = any(n.startswith("token2wav.") for n in made.names())
        assert settings["enable_audio_output"] == decoder == (not codec)
        assert (out / "codec" / "codec.json").is_file() == bool(codec)
        assert ("Audio output needs the codec" in card) == bool(codec)
        assert settings["omni_train"].get("codec") == ("codec" if codec else None)
        assert "Audio output" in card or "Token2Wav was taken over" in card
        # Our own commands read the Talker back, whatever transformers makes of it.
        spoken = build_talker_replica(
            ModelConfig(tokenizer=str(out), init_from=str(out)),
            tokenizer,
            Precision.bf16,
            torch.device("cpu"),
        )
        head = run_weights.tensor("talker.codec_head.weight").to(torch.bfloat16)
        assert torch.equal(spoken.codec_head.weight, head)
        voices = torch.load(out / "spk_dict.pt", weights_only=True)
        assert voices.keys() == spoken.spec.speakers.keys()


def test_the_talker_learns_and_the_thinker_stays(whole: Path) -> None:
    losses = [loss for _, loss, *_ in trace(whole)]
    assert len(losses) == STEPS
    assert losses[-1] < 0.85 * losses[0]
    assert changed_groups(whole) == TALKER
    assert list(read_jsonl(whole / "ledger.jsonl")) == []


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(given: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start("talker_icl", overrides(given, run_dir, *CONTINUED), ranks=2)
    wait_for(lambda: len(read_steps(run_dir / "events.jsonl")) >= 6, process)
    kill(children_of(process.pid)[-1])
    assert finish(process)[0] != 0
    assert len(read_steps(run_dir / "events.jsonl")) < STEPS
    run(overrides(given, run_dir, *CONTINUED))
    assert [e["step"] for e in events(run_dir, "resume")] == [5]
    assert trace(run_dir) == trace(whole)
    assert events(run_dir, "fit_end")[-1]["hashes"] == events(whole, "fit_end")[-1]["hashes"]


EXACT = ("deepspeed.precision=fp32", "fit.max_steps=4")


@pytest.fixture(scope="module")
def plain(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four fp32 steps on two ranks, the Thinker running along."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    run(overrides(given, run_dir, *EXACT))
    return run_dir


def assert_same_course(one: Path, other: Path) -> None:
    for (step, loss, keys, norm, tokens), found in zip(trace(one), trace(other), strict=True):
        assert (step, keys, tokens) == (found[0], found[2], found[4])
        assert loss == pytest.approx(found[1], rel=1e-5)
        assert norm["total"] == pytest.approx(found[3]["total"], rel=1e-4)


@pytest.mark.slow
def test_one_rank_equals_two(given: Path, plain: Path, tmp_path: Path) -> None:
    run(overrides(given, tmp_path / "one", *EXACT), ranks=1)
    assert_same_course(tmp_path / "one", plain)


@pytest.mark.slow
def test_cached_states_give_the_same_course(given: Path, plain: Path, tmp_path: Path) -> None:
    cached = ("thinker=cached", f"states_dir='{tmp_path}/states'")
    run(overrides(given, tmp_path / "run", *EXACT, *cached))
    assert_same_course(tmp_path / "run", plain)
    (made,) = events(tmp_path / "run", "states")
    assert made["made"] == 64
    groups = events(tmp_path / "run", "fit_start")[0]["hashes"]
    assert set(groups) == {*TALKER, "text_rows"}
    # Nothing is made twice, but for what was lost.
    lost = sorted((tmp_path / "states").rglob("*.safetensors"))[:3]
    for path in lost:
        path.unlink()
    run(overrides(given, tmp_path / "again", *EXACT, *cached), ranks=1)
    assert_same_course(tmp_path / "again", plain)
    assert [e["made"] for e in events(tmp_path / "again", "states")] == [3]


@pytest.mark.slow
def test_joint_training_changes_the_thinker_and_a_talker_is_realigned_to_it(
    given: Path, plain: Path, tmp_path: Path
) -> None:
    run(overrides(given, tmp_path / "joint", *EXACT, "thinker=joint", "optim.lr=1e-2"))
    thinker = {"llm", "audio_encoder", "audio_projection", "vision_encoder", "vision_merger"}
    # Nothing is seen in this set, so vision has no gradient.
    changed = changed_groups(tmp_path / "joint")
    assert changed == (TALKER | thinker) - {"vision_encoder", "vision_merger"}
    values = overrides(given, tmp_path / "realigned", *EXACT)
    # The experiment has rates, voices and a source of its own.
    values = [v for v in values if not v.startswith(("optim.", "+data.sources", "model.init"))]
    values += [f"data.sources.speech.path='{given}/named'", f"model.init_from='{tmp_path}/joint'"]
    run(["experiment=talker_icl/realign", *values, f"talker_from='{plain}'"])
    # What it starts from: the Thinker of one run, the Talker of the other.
    before = events(tmp_path / "realigned", "fit_start")[0]["hashes"]
    joint, trained = (events(r, "fit_end")[-1]["hashes"] for r in (tmp_path / "joint", plain))
    assert {g: before[g] for g in thinker} == {g: joint[g] for g in thinker}
    assert {g: before[g] for g in TALKER} == {g: trained[g] for g in TALKER}
    assert changed_groups(tmp_path / "realigned") == TALKER
    rates = read_steps(tmp_path / "realigned" / "events.jsonl")[-1]["lr"]
    assert rates["talker"] < rates["talker_projection"]
    assert trace(tmp_path / "realigned")[-1][1] < trace(tmp_path / "realigned")[0][1]


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        (["model.init_from=''"], "model.init_from"),
        (["thinker=cached", "data.reference=same_speaker"], "thinker"),
        (["states_dir=x"], "states_dir"),
    ],
)
def test_what_could_only_be_a_mistake_is_refused(extra: list[str], key: str) -> None:
    root = find_root("talker_icl")
    cfg = compose_config(root, overrides(Path("given"), Path("run"), *extra))
    assert root.validate is not None
    with pytest.raises(ConfigError) as error:
        root.validate(cfg, 1)
    assert error.value.key == key
