"""The released decoder's wiring on a tiny random model: voices, streaming, loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5OmniToken2WavConfig, Qwen2_5OmniToken2WavModel

from omni_train.config.errors import ConfigError, DataError
from omni_train.speech.codec import CodecConfig, CodecKind, Speaker, load_codec
from omni_train.speech.token2wav import Token2WavCodec, Window, load_speakers
from tests import whole_models

DIT = {**whole_models.DIT, "num_embeds": 33}
BLOCK = 12


@pytest.fixture(scope="module")
def model() -> Qwen2_5OmniToken2WavModel:
    torch.manual_seed(0)
    config = Qwen2_5OmniToken2WavConfig(dit_config=DIT, bigvgan_config=whole_models.VOCODER)
    made = Qwen2_5OmniToken2WavModel(config).float()
    # Random weights attend to nothing in particular: make neighbours matter.
    with torch.no_grad():
        for name, param in made.code2wav_dit_model.named_parameters():
            if param.ndim > 1 and "spk_encoder" not in name:
                param.normal_(0.0, 0.15)
        # A random vocoder whispers, and then any tolerance would do.
        made.code2wav_bigvgan_model.conv_post.weight.mul_(500.0)
    return made


@pytest.fixture(scope="module")
def codec(model: Qwen2_5OmniToken2WavModel) -> Token2WavCodec:
    return Token2WavCodec(model, num_steps=2)


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    generator = torch.Generator().manual_seed(1)
    cond = torch.randn(1, 192, generator=generator)
    return Speaker("tiny", cond, torch.randn(1, 40, 80, generator=generator))


def some_codes(count: int) -> Tensor:
    return torch.randint(0, 32, (count,), generator=torch.Generator().manual_seed(2))


def pieces(codes: Tensor) -> list[Tensor]:
    return list(codes.split(5))


def test_rates_follow_from_the_model(codec: Token2WavCodec, speaker: Speaker) -> None:
    assert (codec.sample_rate_hz, codec.frame_rate_hz, codec.codebook_size) == (24_000, 50, 32)
    wave = codec.decode(some_codes(7), speaker)
    assert wave.shape == (7 * 480,)
    assert torch.isfinite(wave).all()


def test_equal_to_transformers_own_sampling(
    model: Qwen2_5OmniToken2WavModel, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Token2WavCodec(model)
    codes = some_codes(30)
    noise = ours._noise(0, 60)[None]
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise.clone())
    theirs = model(codes[None], speaker.cond, speaker.ref_mel)
    monkeypatch.undo()
    torch.testing.assert_close(ours.decode(codes, speaker), theirs, rtol=0, atol=1e-5)


def test_velocity_of_a_block_needs_two_blocks_back_and_one_ahead(
    codec: Token2WavCodec, speaker: Speaker
) -> None:
    codes, state = some_codes(6 * BLOCK), codec._noise(0, 12 * BLOCK)[None]

    def velocity(first: int, last: int) -> Tensor:
        frames = slice(first * 24, last * 24)
        part = codes[first * BLOCK : last * BLOCK]
        out = codec.velocity(
            state[:, frames], part, speaker.cond, speaker.ref_mel, torch.tensor(0.3)
        )
        return out[:, (3 - first) * 24 : (4 - first) * 24]

    whole = velocity(0, 6)
    # Positions in a window count from its start: rotary angles round differently.
    torch.testing.assert_close(velocity(1, 5), whole, rtol=0, atol=1e-4)
    assert (velocity(2, 5) - whole).abs().max() > 1e-2
    assert (velocity(1, 4) - whole).abs().max() > 1e-2


def test_stream_equals_whole_where_its_window_reaches(
    codec: Token2WavCodec, speaker: Speaker
) -> None:
    codes = some_codes(16 * BLOCK + 5)
    whole = codec.decode(codes, speaker)
    assert whole.std() > 0.01
    parts = list(codec.stream(pieces(codes), speaker, codec.exact_window))
    assert len(parts) > 3
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)
    # One evaluation's window is an approximation: near, and of the same length.
    near = torch.cat(list(codec.stream(pieces(codes), speaker)))
    assert near.shape == whole.shape
    assert (near - whole).abs().max() > 1e-4


def test_stream_speaks_before_the_codes_end(codec: Token2WavCodec, speaker: Speaker) -> None:
    taken = 0

    def arriving() -> object:
        nonlocal taken
        for piece in pieces(some_codes(20 * BLOCK)):
            taken += len(piece)
            yield piece

    next(codec.stream(arriving(), speaker, Window()))  # type: ignore[arg-type]
    assert taken < 6 * BLOCK


def test_speaker_and_codes_are_checked(codec: Token2WavCodec, speaker: Speaker) -> None:
    with pytest.raises(ConfigError, match="none was given"):
        codec.decode(some_codes(4))
    with pytest.raises(DataError, match="bad_codes"):
        codec.decode(torch.tensor([32]), speaker)
    with pytest.raises(ConfigError, match="no encoder"):
        codec.encode(torch.zeros(16_000), 16_000)


def test_loads_from_a_whole_model_or_alone(
    model: Qwen2_5OmniToken2WavModel, speaker: Speaker, tmp_path: Path
) -> None:
    wanted = Token2WavCodec(model).decode(some_codes(9), speaker)
    alone, whole = tmp_path / "alone", tmp_path / "whole"
    model.save_pretrained(alone)
    whole.mkdir()
    tensors = {f"token2wav.{name}": value.clone() for name, value in model.state_dict().items()}
    save_file(tensors, whole / "model.safetensors")
    config = (alone / "config.json").read_text()
    (whole / "config.json").write_text('{"token2wav_config": ' + config + "}")
    for folder in (alone, whole):
        loaded = load_codec(CodecConfig(path=str(folder), kind=CodecKind.token2wav))
        torch.testing.assert_close(loaded.decode(some_codes(9), speaker), wanted)
    tensors.pop("token2wav.code2wav_dit_model.proj_out.weight")
    save_file(tensors, whole / "model.safetensors")
    with pytest.raises(ConfigError, match="proj_out"):
        Token2WavCodec.load(whole)


def test_speakers_are_read_without_running_anything(tmp_path: Path, speaker: Speaker) -> None:
    entry = {"bos_token": 3, "cond": speaker.cond, "ref_mel": speaker.ref_mel}
    torch.save({"tiny": entry}, tmp_path / "spk_dict.pt")
    assert torch.equal(load_speakers(tmp_path / "spk_dict.pt")["tiny"].cond, speaker.cond)

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "touched",))  # type: ignore[return-value]

    torch.save({"tiny": {"cond": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(ConfigError, match="speakers"):
        load_speakers(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()
