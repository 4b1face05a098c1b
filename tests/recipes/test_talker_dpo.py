"""Stages 6 to 8 on a tiny export of the release, Token2Wav in it: no wave-to-code encoder is there.

Candidates on two ranks -> ranking -> pairs -> DPO under ZeRO-3 on two ranks; a new voice.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipelines.demo_content import VOCABULARY
from data_pipelines.shards import Sample, write_shards
from launch.cli import main
from omni_train.data.candidates import read_candidates
from omni_train.data.tars import read_tar
from omni_train.data.tokenizer import load_tokenizer
from omni_train.speech.token2wav import load_speakers
from omni_train.tracking.events import read_jsonl, read_steps
from tests.candidate_sets import content, wav
from tests.numerics.talker_models import VOICE, make_models
from tests.recipes.launching import children_of, finish, kill, start, wait_for
from tests.recipes.test_talker_icl import TALKER, changed_groups, events

TEXTS = tuple(f"{one}, {other}" for one, other in zip(VOCABULARY[:8], VOCABULARY[8:], strict=True))
MAX_CODES, STEPS = 96, 4
ASR = f"pocketsphinx:{','.join(VOCABULARY)}"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released directory, and requests whose replies nobody spoke yet."""
    root = tmp_path_factory.mktemp("released")
    models = make_models(root / "omni")
    (weights,) = (root / "omni").glob("*.safetensors")
    save_file(audible(load_file(weights)), weights, metadata={"format": "pt"})
    voice = {"cond": torch.zeros(1, 16), "ref_mel": torch.zeros(1, 30, 80)}
    token = models.tokenizer.get_vocab()[VOICE]
    torch.save({VOICE: {"bos_token": token, **voice}}, root / "omni" / "spk_dict.pt")
    models.tokenizer.save_pretrained(root / "tokenizer")
    samples = []
    for number, text in enumerate(TEXTS):
        heard = {"type": "audio", "audio": "0.wav"}
        asked = {"role": "user", "content": [heard, {"type": "text", "text": f"say {text}"}]}
        record = {"messages": [asked, {"role": "assistant", "content": text}], "speaker": VOICE}
        samples.append(Sample(f"q{number}", record, {"0.wav": wav("river")}))
    write_shards(samples, root / "requests", tokenizer=models.tokenizer, samples_per_shard=3)
    return root


def audible(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an untrained model that can be told apart by ear: it hums, long or short.

    A random decoder whispers, and a random Talker of these tests is too sure of what comes next to
    end; PocketSphinx hears `banana` in a hum of 0.3 s, and nothing in a shorter one.
    """
    rng = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            continue
        if name.startswith("token2wav.code2wav_dit") and "spk_encoder" not in name:
            tensor.normal_(0.0, 0.15, generator=rng)
        elif name.startswith("token2wav.code2wav_bigvgan"):
            tensor.mul_(2000.0 if name.endswith("conv_post.weight") else 3.0)
        elif name == "talker.codec_head.weight":
            tensor.mul_(0.1)
    return tensors


def common(given: Path, run_dir: Path) -> list[str]:
    return [
        f"run.dir='{run_dir}'",
        f"model.tokenizer='{given}/tokenizer'",
        f"model.init_from='{given}/omni'",
        "tracking.wandb=false",
    ]


def candidate_overrides(given: Path, run_dir: Path, *extra: str) -> list[str]:
    return [
        *common(given, run_dir),
        "precision=fp32",
        f"requests.path='{given}/requests'",
        f"requests.codec.path='{given}/omni'",
        "requests.codec.kind=token2wav",
        f"requests.sampling.max_codes={MAX_CODES}",
        "requests.sampling.num_samples=4",
        "requests.sampling.temperature=1",
        "requests.sampling.top_k=0",
        "requests.sampling.top_p=1",
        "requests.sampling.num_slots=4",
        "requests.requests_per_shard=2",
        *extra,
    ]


def run(recipe: str, overrides: list[str], *, ranks: int = 2) -> str:
    code, output = finish(start(recipe, overrides, ranks=ranks))
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def sampled(given: Path) -> Path:
    """Candidates of two ranks."""
    run_dir = given / "candidates"
    run("talker_candidates", candidate_overrides(given, run_dir))
    return run_dir


@pytest.fixture(scope="module")
def pairs(given: Path, sampled: Path) -> Path:
    """Ranked and paired by the command line."""
    made, ranking = str(sampled / "candidates"), str(given / "ranking")
    assert main(["talker", "rank", made, ranking, "--asr", ASR, "--workers", "0"]) == 0
    command = ["talker", "pairs", made, ranking, str(given / "pairs")]
    # Of a Talker that has learnt nothing every answer is bad.
    command += ["--max-length-ratio", "100", "--max-chosen-score", "100"]
    command += ["--tokenizer", str(given / "tokenizer")]
    assert main(command) == 0
    return given / "pairs"


def test_candidates_have_codes_waves_and_what_made_them(sampled: Path) -> None:
    record = json.loads((sampled / "candidates" / "candidates.json").read_text())
    assert (record["num_candidates"], len(record["shards"])) == (4 * len(TEXTS), 4)
    found = []
    for shard in record["shards"]:
        for request, members in read_candidates(sampled / "candidates" / shard["name"]):
            # The context travels along, once.
            assert members["0.wav"] == wav("river")
            assert (request["seed"], request["model"]) == (0, record["model"])
            assert request["sampling"]["temperature"] == 1.0
            for entry in request["candidates"]:
                assert (f"{entry['name']}.codes.npy" in members) == (entry["num_codes"] > 0)
                assert entry["num_codes"] <= MAX_CODES
                found.append((request["text"], members.get(f"{entry['name']}.codes.npy")))
    assert {text for text, _ in found} == set(TEXTS)
    assert len({codes for _, codes in found}) > len(TEXTS), "samples differ"


def dpo_overrides(given: Path, pairs: Path, run_dir: Path, *extra: str) -> list[str]:
    return [
        *common(given, run_dir),
        f"+data.sources={{pairs: {{path: '{pairs}'}}}}",
        "data.pack_tokens=400",
        "data.pack_positions=600",
        "data.global_batch_packs=4",
        "data.num_workers=0",
        "preference.sft_weight=0.2",
        "optim.lr=1e-3",
        "deepspeed.precision=fp32",
        f"fit.max_steps={STEPS}",
        "fit.save_steps=2",
        *extra,
    ]


def spoken_while_training(given: Path, *settings: str, limit: int = 2) -> list[str]:
    asr = f"{{kind: pocketsphinx, vocabulary: [{', '.join(VOCABULARY)}]}}"
    codec = f"{{path: '{given}/omni', kind: token2wav}}"
    sampling = f"{{max_codes: {MAX_CODES}, num_slots: 4}}"
    task = f"{{path: '{given}/spoken', codec: {codec}, asr: {asr}, sampling: {sampling}"
    task += f", limit: {limit}}}"
    return [f"+spoken.tasks={{spoken: {task}}}", *(f"spoken.{text}" for text in settings)]


@pytest.fixture(scope="module")
def trained(given: Path, pairs: Path) -> Path:
    run_dir = given / "dpo"
    # A spoken set to be asked for while training; its codes are not looked at.
    shutil.copytree(pairs, given / "spoken")
    spoken = spoken_while_training(given, "every_steps=2", "max_rise=null")
    run("talker_dpo", dpo_overrides(given, pairs, run_dir, *spoken))
    return run_dir


def test_dpo_trains_the_talker_alone_and_prefers_the_chosen(trained: Path) -> None:
    assert changed_groups(trained) == TALKER
    steps = read_steps(trained / "events.jsonl")
    first, last = steps[0]["metrics"], steps[-1]["metrics"]
    # What training starts from is the reference.
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert last["rewards/margins"] > first["rewards/margins"]
    assert last["rewards/accuracies"] > 0.5
    assert {"logps/chosen", "logps/rejected", "rewards/chosen"} <= set(last)
    (scored,) = events(trained, "reference")
    assert scored["pairs_scored"] > 4
    assert [e["step"] for e in events(trained, "spoken")] == [2, 4]
    assert all(e["stop"] is False for e in events(trained, "spoken"))


@pytest.mark.slow
def test_stopped_and_resumed_on_other_ranks_nothing_is_sampled_twice(
    given: Path, sampled: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    folder = run_dir / "candidates"
    process = start("talker_candidates", candidate_overrides(given, run_dir), ranks=2)
    wait_for(lambda: len(list(folder.glob("shard-*.json"))) >= 2, process)
    kill(children_of(process.pid)[-1])
    assert finish(process)[0] != 0
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*.json")}
    assert len(before) < 4
    run("talker_candidates", candidate_overrides(given, run_dir), ranks=1)
    assert {n: (folder / n).stat().st_mtime_ns for n in before} == before
    assert content(folder) == content(sampled / "candidates")
    assert [e["shards_made"] for e in events(run_dir, "candidates")] == [4 - len(before)]
    code, output = finish(
        start(
            "talker_candidates",
            candidate_overrides(
                given, run_dir, "requests.sampling.seed=1", "run.resume_allow=[requests]"
            ),
            ranks=1,
        )
    )
    assert code != 0
    assert "candidates of another job" in output


@pytest.mark.slow
def test_another_reference_is_refused_and_the_control_shares_it(
    given: Path, pairs: Path, trained: Path, tmp_path: Path
) -> None:
    shared = f"reference_dir='{trained}/reference'"
    control = ("preference.loss=sft", "preference.sft_weight=0")
    run("talker_dpo", dpo_overrides(given, pairs, tmp_path / "sft", shared, *control), ranks=1)
    assert [e["pairs_scored"] for e in events(tmp_path / "sft", "reference")] == [0]
    losses = [step["loss"] for step in read_steps(tmp_path / "sft" / "events.jsonl")]
    assert losses[-1] < losses[0]
    other = dpo_overrides(given, pairs, tmp_path / "x", shared, f"model.init_from='{trained}'")
    sizes = "model.tiny={text_width: 64, text_layers: 2, audio_width: 64, audio_layers: 1, "
    sizes += (
        "vision_width: 64, vision_layers: 2, talker_width: 128, talker_layers: 2, num_codes: 96}"
    )
    code, output = finish(start("talker_dpo", [*other, sizes], ranks=1))
    assert code != 0
    assert "of another reference" in output


@pytest.mark.slow
def test_rising_word_errors_end_the_run_for_good(
    given: Path, pairs: Path, trained: Path, tmp_path: Path
) -> None:
    # Far enough for requests with the one word that a hum is heard as, while it is long enough.
    ends = spoken_while_training(given, "every_steps=1", "max_rise=0.0", limit=8)
    values = dpo_overrides(given, pairs, tmp_path / "run", *ends, "optim.lr=0.05")
    values = [value.replace(f"max_steps={STEPS}", "max_steps=30") for value in values]
    run("talker_dpo", values, ranks=1)
    found = events(tmp_path / "run", "spoken")
    stopped = [e["step"] for e in found if e["stop"]]
    assert stopped == [found[-1]["step"]]
    assert found[-1]["wer"] > min(e["wer"] for e in found)
    run("talker_dpo", values, ranks=1)
    assert len(read_steps(tmp_path / "run" / "events.jsonl")) == stopped[0] < 30


@pytest.mark.slow
def test_one_rank_equals_two_and_resumes(
    given: Path, pairs: Path, trained: Path, tmp_path: Path
) -> None:
    def trace(run_dir: Path) -> list[tuple[Any, ...]]:
        steps = read_steps(run_dir / "events.jsonl")
        return [(s["step"], s["keys"], s["target_tokens"]) for s in steps]

    run_dir = tmp_path / "run"
    shared = f"reference_dir='{trained}/reference'"
    values = dpo_overrides(given, pairs, run_dir, shared)
    half = [value.replace(f"max_steps={STEPS}", "max_steps=2") for value in values]
    run("talker_dpo", [*half, "optim.schedule=constant"], ranks=1)
    whole = [*values, "optim.schedule=constant", "run.resume_allow=[fit]"]
    run("talker_dpo", whole, ranks=1)
    assert trace(run_dir) == trace(trained)
    mine, theirs = (read_steps(d / "events.jsonl")[0]["loss"] for d in (run_dir, trained))
    assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_a_new_voice_has_a_row_and_a_place_in_the_decoder(
    given: Path, pairs: Path, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "voice.wav").write_bytes(wav("river doctor paper window apple"))
    codes = next(
        data
        for tar in sorted((given / "candidates" / "candidates").glob("*.tar"))
        for _, members in read_candidates(tar)
        for name, data in members.items()
        if name.endswith(".codes.npy")
    )
    (tmp_path / "voice.codes.npy").write_bytes(codes)
    samples = []
    for tar in sorted(pairs.glob("*.tar")):
        for number, (key, members) in enumerate(read_tar(tar)):
            record = json.loads(members.pop("json")) | {"speaker": ("old", "anna")[number % 2]}
            samples.append(Sample(key, record, members))
    tokenizer = load_tokenizer(str(given / "tokenizer"))
    write_shards(samples, tmp_path / "named", tokenizer=tokenizer, samples_per_shard=99)
    anna = f"{{recording: '{tmp_path}/voice.wav', cond: fitted, known: '{VOICE}', fit_steps: 20, "
    anna += f"codes: '{tmp_path}/voice.codes.npy'}}"
    usual = dpo_overrides(given, tmp_path / "named", tmp_path / "run")
    values = [
        *(value for value in usual if not value.startswith("preference")),
        f"+model.speakers={{old: '{VOICE}', anna: '<|speaker_2|>'}}",
        "model.new_speakers=[anna]",
        f"decoder.path='{given}/omni'",
        f"+decoder.voices={{anna: {anna}}}",
    ]
    run("talker_speaker_sft", values, ranks=2)
    run_dir = tmp_path / "run"
    # Of the table the new row alone.
    assert changed_groups(run_dir) == TALKER | {"speaker_rows"}
    voices = load_speakers(run_dir / "spk_dict.pt")
    assert set(voices) == {VOICE, "anna"}
    assert voices["anna"].ref_mel.shape[2] == 80
    assert not torch.equal(voices["anna"].cond, voices[VOICE].cond)
    assert torch.equal(voices[VOICE].ref_mel, torch.zeros(1, 30, 80))
    (fit,) = events(run_dir, "voice_fit")
    assert fit["loss_last"] < fit["loss_first"]
    assert list(read_jsonl(run_dir / "ledger.jsonl")) == []
