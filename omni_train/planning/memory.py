"""Peak memory of one device, part by part, in bytes.

    static      (2 P_frozen + 18 P_trained) / shards
    gathered    live weights under ZeRO-3, its prefetch, the largest tensor with its gradient
    kept        t * layers * what a layer keeps (shapes.py), for each decoder with gradients
    working     t * (6 FFN + 20.5 width), the layer being run
    logits      10.5 V t where they are built; one tile of the fused kernel otherwise
    encoders    patches and frames of the fullest pack, layer by layer
    rest        what no formula gives, learned from one measured step

t is the number of tokens per device. Below ZeRO-3 whole weights lie on every device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from omni_train.models.thinker import TILE_COLUMNS
from omni_train.planning.constants import Constants
from omni_train.planning.shapes import TOWER_SHARES, EncoderLoad, Recompute, Setup

# DeepSpeed's own limits under ZeRO-3: weights that stay gathered, and what is fetched ahead.
MAX_LIVE_PARAMETERS = 1_000_000_000
PREFETCH_PARAMETERS = 50_000_000
# Rows of one tile of TRL's fused kernel, and bytes: bf16 with an fp32 copy and gradient.
TILE_ROWS, TILE_BYTES_PER_VALUE = 4096, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one device by part, and what lies in host memory beside it.

    Args:
        static, gathered, kept, working, logits, encoders, rest: see the module.
        host: bytes per node of activations kept there.
    """

    static: float
    gathered: float
    kept: float
    working: float
    logits: float
    encoders: float
    rest: float
    host: float

    @property
    def parts(self) -> dict[str, float]:
        """The device's parts by name."""
        values = asdict(self)
        del values["host"]
        return values

    @property
    def total(self) -> float:
        """Bytes of the device."""
        return sum(self.parts.values())


def estimate_memory(setup: Setup, constants: Constants, *, devices_per_node: int = 8) -> Memory:
    """Return the peak memory of a run's device."""
    kept = host = working = logits = 0.0
    for load in setup.decoders:
        shape, tokens = load.shape, load.tokens / setup.sequence_parallel
        width = constants.work_bytes_per_width * shape.width + 6 * shape.ffn
        # Layers run one after the other, and so do the decoders.
        working = max(working, tokens * width * setup.bytes_per_value / 2)
        if not load.gradients:
            continue
        seen = load.loss_tokens / setup.sequence_parallel
        bytes_kept = tokens * shape.layers * shape.kept_bytes(setup.recompute)
        bytes_kept *= setup.bytes_per_value / 2
        if setup.offload_activations and setup.recompute is Recompute.full:
            host += bytes_kept * min(devices_per_node, setup.devices)
            bytes_kept /= shape.layers
        kept += bytes_kept
        if setup.fused_loss:
            tile = min(TILE_ROWS, seen) * min(TILE_COLUMNS, shape.vocab)
            logits = max(logits, TILE_BYTES_PER_VALUE * tile)
        else:
            logits += constants.logit_bytes * shape.vocab * seen
    encoders = sum(_encoder_bytes(load, setup, constants) for load in setup.encoders)
    return Memory(
        static=_static_bytes(setup, constants),
        gathered=_gathered_bytes(setup),
        kept=kept,
        working=working,
        logits=logits,
        encoders=encoders,
        rest=constants.rest_bytes,
        host=host,
    )


def _static_bytes(setup: Setup, constants: Constants) -> float:
    frozen = setup.parameters - setup.trained_parameters
    weight = setup.bytes_per_value
    per_frozen = constants.bytes_per_frozen * weight / 2
    shards = setup.devices
    if setup.zero_stage == 3:
        return (
            per_frozen * frozen + constants.bytes_per_trained * setup.trained_parameters
        ) / shards
    # Weights, and below stage 2 gradients too, whole on every device.
    gradients = 2 if setup.zero_stage == 1 else 0
    whole = per_frozen * frozen + (weight + gradients) * setup.trained_parameters
    sharded = constants.bytes_per_trained - weight - gradients
    return whole + sharded * setup.trained_parameters / shards


def _gathered_bytes(setup: Setup) -> float:
    if setup.zero_stage != 3:
        return 0.0
    live = min(setup.parameters, MAX_LIVE_PARAMETERS)
    ahead = min(setup.parameters, PREFETCH_PARAMETERS)
    return setup.bytes_per_value * (live + ahead + 2 * setup.largest_tensor)


def _encoder_bytes(load: EncoderLoad, setup: Setup, constants: Constants) -> float:
    """Activations of a tower, under the same policy as the decoder."""
    scale = setup.bytes_per_value / 2
    work = constants.work_bytes_per_width * load.width + 6 * load.ffn
    # Norms, q, k, v, attention's output, sums; three FFN products. Or the input alone.
    whole, share = 9 * load.width + 3 * load.ffn, TOWER_SHARES[setup.recompute]
    kept = (1.0 - share) * whole + share * load.width
    return load.peak_units * (work + 2 * kept * load.layers * load.trained) * scale
