"""The released decoder as a codec: codes -> mel (flow-matching DiT) -> wave (BigVGAN), in a voice.

Decodes only; the encoder was never released (RECIPE.md section 6). The modules are transformers';
what is here: loading without pickles, noise that belongs to a place, and streaming.

One evaluation of the DiT sees two blocks of 24 mel frames back, its own and one ahead. Solving the
flow evaluates it again and again, so what a frame depends on grows with every evaluation: a window
of 2 + 1 + 1 blocks gives the velocity of a whole decode, and a wave near to it. The wave of a whole
decode needs a window that many evaluations wide (`exact_window`).

Letters: T codes, L mel frames (2 per code), M mel bins, C speaker embedding, S samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Qwen2_5OmniToken2WavConfig, Qwen2_5OmniToken2WavModel
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import RungeKutta4ODESolver

from omni_train.config.errors import ConfigError, DataError
from omni_train.engine.foreign import load_tensors
from omni_train.models.weights import SafetensorsSource
from omni_train.speech.codec import Speaker, arriving, check_codes

SPEAKERS_FILE = "spk_dict.pt"
_MEL_FRAMES_PER_SECOND = 100
_EVALUATIONS_PER_STEP = 4
# Taps of the vocoder's anti-aliasing filters on one side, rounded up, at the rate they run at.
_FILTER_TAPS = 8


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks around the one that is decoded.

    Args:
        back, ahead: blocks of codes before and after it.
    """

    back: int = 2
    ahead: int = 1


class Token2WavCodec:
    """Codes to waves in the voice of a speaker.

    Args:
        model: in fp32, on its device.
        num_steps: time points of the flow.
        guidance_scale: weight of classifier-free guidance.
        sway: how time points crowd at the start; -1 as released.
        seed: of the noise; a place has the same noise in every decode.
    """

    # It gives no codes that could be compared.
    fingerprint = ""

    def __init__(
        self,
        model: Qwen2_5OmniToken2WavModel,
        *,
        num_steps: int = 10,
        guidance_scale: float = 0.5,
        sway: float = -1.0,
        seed: int = 0,
    ) -> None:
        self._dit: Any = model.code2wav_dit_model.eval()
        self._vocoder: Any = model.code2wav_bigvgan_model.eval()
        self._guidance, self._seed = guidance_scale, seed
        times = torch.linspace(0, 1, num_steps)
        self._times = times + sway * (torch.cos(torch.pi / 2 * times) - 1 + times)
        dit, vocoder = self._dit.config, self._vocoder.config
        self.codebook_size: int = dit.num_embeds - 1
        self.frame_rate_hz: int = _MEL_FRAMES_PER_SECOND // dit.repeats
        self._hop = math.prod(vocoder.upsample_rates)
        self.sample_rate_hz: int = _MEL_FRAMES_PER_SECOND * self._hop
        self.block_codes: int = dit.block_size // dit.repeats

    @classmethod
    def load(cls, path: str | Path, device: torch.device | None = None) -> Self:
        """Read the decoder out of a directory of Qwen2.5-Omni, or one that holds it alone.

        Raises:
            ConfigError: no usable model, or tensors are missing or too many.
        """
        try:
            record = json.loads((Path(path) / "config.json").read_bytes())
            record = record.get("token2wav_config", record)
            config = Qwen2_5OmniToken2WavConfig(
                dit_config=record["dit_config"], bigvgan_config=record["bigvgan_config"]
            )
            source = SafetensorsSource(str(path))
            # A file of the decoder alone has no prefix, which the source takes for the Thinker's.
            names = {
                n: n.removeprefix("thinker.").removeprefix("token2wav.") for n in source.names()
            }
            kept = {s: n for n, s in names.items() if s.startswith("code2wav_")}
            model: Any = Qwen2_5OmniToken2WavModel(config).float()
            model.load_state_dict({name: source.tensor(own) for name, own in kept.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                key="codec.path",
                value=str(path),
                rule=f"no usable Token2Wav: {error}",
                remedy="give a directory of Qwen2.5-Omni with config.json and safetensors",
            ) from error
        return cls(model.to(device or torch.device("cpu")))

    def encode(self, wave: Tensor, sample_rate_hz: int) -> Tensor:
        """Raise: no encoder of these codes was released."""
        raise ConfigError(
            key="codec.kind",
            value="token2wav",
            rule="has no encoder: it was never released",
            remedy="use codes in the shards, or codec.kind=mel_kmeans",
        )

    def decode(self, codes: Tensor, speaker: Speaker | None = None) -> Tensor:
        """Return float32 [S] on the CPU, S = 2 T mel frames at 24 kHz, of codes int64 [T]."""
        check_codes(codes, self.codebook_size)
        return self._to_wave(self.mel(codes, _given(speaker)))

    def stream(
        self, codes: Iterable[Tensor], speaker: Speaker | None = None, window: Window | None = None
    ) -> Iterator[Tensor]:
        """Yield pieces of the wave while codes arrive; together as long as a whole decode.

        A block of 12 codes is spoken as soon as the blocks ahead that its window asks for, and
        those that the vocoder looks ahead, have arrived.

        Args:
            codes: int64 pieces of any length.
            speaker: the voice.
            window: blocks around each; the receptive field of one evaluation where left out.
        """
        speaker, window = _given(speaker), window or Window()
        mel: list[Tensor] = []
        spoken = 0
        margin = -(-self.vocoder_radius // self._dit.config.block_size)
        for heard, more in arriving(codes):
            blocks = -(-len(heard) // self.block_codes)
            full = len(heard) // self.block_codes - window.ahead if more else blocks
            while len(mel) < full:
                mel.append(self._block(heard, len(mel), speaker, window))
            ready = len(mel) - margin if more else len(mel)
            if ready > spoken:
                yield self._speak(mel, spoken, ready, margin)
                spoken = ready

    @torch.no_grad()
    def mel(self, codes: Tensor, speaker: Speaker, first_block: int = 0) -> Tensor:
        """Return log-mel float32 [L, M] of codes int64 [T] that begin at a block's start."""
        device = self._dit.proj_out.weight.device
        noise = self._noise(first_block, len(codes) * self._dit.config.repeats).to(device)
        cond, reference = speaker.cond.to(device), speaker.ref_mel.to(device)

        def velocity(time: Tensor, state: Tensor) -> Tensor:
            return self.velocity(state, codes.to(device), cond, reference, time)

        solver = RungeKutta4ODESolver(function=velocity, initial_value=noise[None])
        return solver.integrate(self._times.to(device))[-1][0]

    @torch.no_grad()
    def velocity(
        self, state: Tensor, codes: Tensor, cond: Tensor, ref_mel: Tensor, time: Tensor
    ) -> Tensor:
        """Return the guided velocity float32 [1, L, M] at state [1, L, M] and time []."""
        out = self._dit(
            hidden_states=state,
            speaker_embedding=cond[:, None].expand(-1, state.shape[1], -1),
            condition_vector=ref_mel,
            quantized_code=codes[None],
            time_step=time,
            apply_cfg=True,
        )
        guided, free = out.chunk(2, dim=0)
        return guided + (guided - free) * self._guidance

    def flow(
        self, state: Tensor, codes: Tensor, cond: Tensor, ref_mel: Tensor, time: Tensor
    ) -> Tensor:
        """Return the unguided velocity [1, L, M] with its graph, as in training; see `velocity`."""
        out: Tensor = self._dit(
            hidden_states=state,
            speaker_embedding=cond[:, None].expand(-1, state.shape[1], -1),
            condition_vector=ref_mel,
            quantized_code=codes[None],
            time_step=time,
            apply_cfg=False,
        )
        return out

    @property
    def frames_per_code(self) -> int:
        """Mel frames that one code stands for."""
        frames: int = self._dit.config.repeats
        return frames

    def mel_frames(self, codes: Tensor) -> int:
        """Return the mel frames L of codes int64 [T]."""
        return len(codes) * self.frames_per_code

    @property
    def exact_window(self) -> Window:
        """Window from which a block comes out as in a whole decode."""
        evaluations = _EVALUATIONS_PER_STEP * (len(self._times) - 1)
        dit = self._dit.config
        back, ahead = len(dit.look_backward_layers), len(dit.look_ahead_layers)
        return Window(back * evaluations, ahead * evaluations)

    @property
    def vocoder_radius(self) -> int:
        """Mel frames to each side that a sample of the wave can depend on."""
        config = self._vocoder.config
        frames, rate = 3.0, 1
        for stride, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            frames += kernel / stride / rate
            rate *= stride
            branches = zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            )
            frames += max(_branch_taps(size, dilations) for size, dilations in branches) / rate
        return math.ceil(frames + (_FILTER_TAPS + 3) / rate)

    def _block(self, codes: Tensor, block: int, speaker: Speaker, window: Window) -> Tensor:
        first = max(block - window.back, 0)
        part = codes[first * self.block_codes : (block + window.ahead + 1) * self.block_codes]
        check_codes(part, self.codebook_size)
        size = self._dit.config.block_size
        return self.mel(part, speaker, first)[(block - first) * size : (block - first + 1) * size]

    def _speak(self, mel: list[Tensor], start: int, stop: int, margin: int) -> Tensor:
        """Wave of blocks start .. stop, with `margin` blocks on both sides for the vocoder."""
        first = max(start - margin, 0)
        wave = self._to_wave(torch.cat(mel[first : stop + margin]))
        skip = sum(len(block) for block in mel[first:start]) * self._hop
        length = sum(len(block) for block in mel[start:stop]) * self._hop
        return wave[skip : skip + length]

    @torch.no_grad()
    def _to_wave(self, mel: Tensor) -> Tensor:
        wave: Tensor = self._vocoder(mel.T[None])
        return wave.reshape(-1).float()

    def _noise(self, first_block: int, num_frames: int) -> Tensor:
        size, bins = self._dit.config.block_size, self._dit.config.mel_dim
        blocks = []
        for block in range(first_block, first_block - (-num_frames // size)):
            generator = torch.Generator().manual_seed((self._seed << 32) + block)
            blocks.append(torch.randn(size, bins, generator=generator))
        return torch.cat(blocks)[:num_frames]


def _branch_taps(kernel: int, dilations: Iterable[int]) -> int:
    """Samples to each side that one residual branch of the vocoder sees."""
    half = (kernel - 1) // 2
    return sum(half * dilation + half + 2 * _FILTER_TAPS for dilation in dilations)


def _given(speaker: Speaker | None) -> Speaker:
    if speaker is None:
        raise ConfigError(
            key="speaker",
            value=None,
            rule="token2wav speaks in the voice it is given, and none was given",
            remedy="give one of spk_dict.pt",
        )
    return speaker


def load_speakers(path: str | Path) -> dict[str, Speaker]:
    """Read a `spk_dict.pt` of the release: name -> {bos_token, cond [1, C], ref_mel [1, L, M]}.

    Raises:
        ConfigError: no such file, or it holds something else; nothing in it is executed.
    """
    try:
        table = load_tensors(Path(path), key="speakers")
        speakers = {
            str(name): Speaker(str(name), entry["cond"].float(), entry["ref_mel"].float())
            for name, entry in table.items()
        }
        for speaker in speakers.values():
            if speaker.cond.ndim != 2 or speaker.ref_mel.ndim != 3:
                raise DataError("bad_speaker", f"{speaker.name} has other shapes")
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            key="speakers",
            value=str(path),
            rule=f"no usable table of speakers: {type(error).__name__}: {error}",
            remedy="give the spk_dict.pt of a release",
        ) from error
    return speakers
