"""What the GPU rows share: the place where they run, models of released widths, timing, ceilings.

Every script takes `--tiny`: the same code on a CPU at tiny size, which measures nothing and shows
that it runs. Without it and without a GPU a script says so and ends with 66.

Attention is what is there: our own uses torch's variable-length kernel on Ampere or later, and
segment by segment otherwise; the peer's is `flash_attention_2` where that package is installed, and
SDPA otherwise. The device and both choices are in the notes.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniThinkerTextModel,
)

from benchmarks.loads import SPEC
from benchmarks.report import NO_GPU, Row, not_taken, parser, show
from omni_train.data.tokenizer import train_tokenizer
from omni_train.data.types import ModelSpec
from omni_train.models.config import ModelPreset, TinySizes
from omni_train.models.presets import RELEASED_TOKENS, build_config, model_spec
from omni_train.models.thinker import LogProbHead, ThinkerForTraining

Made = TypeVar("Made")
TEXTS = ["what is seen and heard in this recording", "a short answer in a few plain words"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is taken.

    Args:
        device: the GPU; the CPU where `tiny`.
        tiny: sizes that only show that the code runs.
    """

    device: torch.device
    tiny: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.float32 if self.tiny else torch.bfloat16

    def pick(self, full: Made, tiny: Made) -> Made:
        """Return the size that is meant here."""
        return tiny if self.tiny else full

    @property
    def note(self) -> str:
        """The device and what attends."""
        if self.tiny:
            return "tiny, on a CPU: these are no measurements"
        capable = torch.cuda.get_device_capability(self.device) >= (8, 0)
        ours = "torch's varlen kernel" if capable else "SDPA by segment"
        name = torch.cuda.get_device_name(self.device)
        return f"{name}; attention: ours {ours}, the peer's {peer_attention()}"


Measure = Callable[[Place, int], tuple[list[Row], list[str]]]


def peer_attention() -> str:
    """Return the best attention of transformers that is installed."""
    return "flash_attention_2" if find_spec("flash_attn") else "sdpa"


def taken(description: str, measure: Measure) -> int:
    """Run a script: parse its options, measure, print; return its exit status."""
    options = parser(description)
    options.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU: no measurement")
    args = options.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        return not_taken(NO_GPU, as_json=args.json)
    place = Place(torch.device("cpu" if args.tiny else "cuda"), args.tiny)
    rows, notes = measure(place, args.pairs)
    if args.tiny:
        rows = [replace(row, goal=0.0) for row in rows]
    return show(rows, ("torch", "transformers"), [place.note, *notes], as_json=args.json)


def build(place: Place, make: Callable[[], Made]) -> Made:
    """Make a model on the device at once, with random weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(place.dtype)
    torch.manual_seed(0)
    try:
        with torch.device(place.device):
            return make()
    finally:
        torch.set_default_dtype(before)


def thinker_config(place: Place, *, layers: int, tower_layers: int) -> Any:
    """Return the 7B Thinker's config (tiny: the tiny one), with fewer layers."""
    if place.tiny:
        tokenizer = train_tokenizer(TEXTS, vocab_size=400)
        return build_config(ModelPreset.tiny, tokenizer, TinySizes()).thinker_config
    config = copy.deepcopy(build_config(ModelPreset.qwen2_5_omni_7b).thinker_config)
    text = config.text_config
    text.num_hidden_layers, text.layer_types = layers, text.layer_types[:layers]
    config.vision_config.depth = tower_layers
    config.audio_config.encoder_layers = tower_layers
    return config


def data_spec(place: Place) -> ModelSpec:
    """Return what the data side must know of `thinker_config`."""
    if place.tiny:
        tokenizer = train_tokenizer(TEXTS, vocab_size=400)
        return model_spec(thinker_config(place, layers=0, tower_layers=0), tokenizer)
    return replace(SPEC, tokens=RELEASED_TOKENS)


def thinkers(
    place: Place, *, layers: int, tower_layers: int
) -> tuple[ThinkerForTraining, Qwen2_5OmniThinkerForConditionalGeneration]:
    """Return ours and transformers' own, with the same weights."""
    config = thinker_config(place, layers=layers, tower_layers=tower_layers)
    ours, peer = (
        build(place, lambda: Qwen2_5OmniThinkerForConditionalGeneration(copy.deepcopy(config)))
        for _ in range(2)
    )
    peer.load_state_dict(ours.state_dict())
    peer.set_attn_implementation(peer_attention())
    return ThinkerForTraining(ours).train(), peer.train()


def language_model(place: Place, *, layers: int) -> tuple[nn.Module, LogProbHead]:
    """Return the Thinker's layers with its head, of 7B's width."""
    config = thinker_config(place, layers=layers, tower_layers=1).text_config
    size = (config.hidden_size, config.vocab_size)
    model = build(place, lambda: Qwen2_5OmniThinkerTextModel(config))
    return model.train(), build(place, lambda: LogProbHead(*size, bias=False))


def parameters(model: nn.Module) -> int:
    """Return the parameters that are multiplied with; an embedding's are looked up."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in tables)


def seconds(place: Place, work: Callable[[], object]) -> float:
    """Return how long a call takes, the device's work included."""
    _wait(place)
    start = time.perf_counter()
    work()
    _wait(place)
    return time.perf_counter() - start


def median_s(place: Place, work: Callable[[], object], times: int) -> tuple[float, float, float]:
    """Return median, shortest and longest of several calls, after one untimed."""
    work()
    found = [seconds(place, work) for _ in range(times)]
    return statistics.median(found), min(found), max(found)


def peak_bytes(place: Place, work: Callable[[], object]) -> int:
    """Return the peak of the device's memory over what is there before; 1 on a CPU."""
    if place.tiny:
        work()
        return 1
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    _wait(place)
    return torch.cuda.max_memory_allocated() - before


def matmul_flops(place: Place, times: int = 5) -> float:
    """Return the rate of a large product of random matrices: the ceiling of all others."""
    side = place.pick(8192, 128)
    left, right = (torch.randn(side, side, device=place.device, dtype=place.dtype) for _ in "ab")
    return 2 * side**3 / median_s(place, lambda: left @ right, times)[0]


def rate_row(
    name: str, flops: float, timed: tuple[float, float, float], ceiling: float, goal: float
) -> Row:
    """Return what share of `ceiling` FLOP/s a piece of work of so many FLOPs reaches."""
    middle, shortest, longest = (flops / one for one in timed)
    shares = (middle / ceiling, longest / ceiling, shortest / ceiling)
    return Row(name, middle / 1e12, ceiling / 1e12, "TF/s", *shares, goal)


def limit_row(name: str, value: float, most: float, unit: str) -> Row:
    """Return a row whose value must not be above `most`; one value has no range."""
    ratio = most / max(value, 1e-12)
    return Row(name, value, most, unit, ratio, ratio, ratio, 1.0)


def clear(model: nn.Module, *inputs: Tensor) -> None:
    """Drop gradients, so that every pass does the same."""
    model.zero_grad(set_to_none=True)
    for tensor in inputs:
        tensor.grad = None


def _wait(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)


def run_main(description: str, measure: Measure) -> None:
    """End the process with a script's exit status."""
    sys.exit(taken(description, measure))
