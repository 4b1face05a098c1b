"""What of a model and of a micro-step an estimate needs: sizes, what is trained, how much there is.

Plain numbers; where they come from is `omni_train.planning.model` (a configuration) and `rows.py`
(published measurements). Nothing is estimated here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Recompute(Enum):
    """Which activations a decoder keeps for the backward pass.

    none keeps all; products keeps attention's and every second product's output (torchtitan's
    selective policy); selective keeps the input alone of every second layer; full of each layer.
    """

    none = "none"
    products = "products"
    selective = "selective"
    full = "full"


# Share of a tower's layers that run twice; its products are not told apart.
TOWER_SHARES = {
    Recompute.none: 0.0,
    Recompute.products: 0.5,
    Recompute.selective: 0.5,
    Recompute.full: 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes of a decoder-only transformer with a gated FFN and grouped-query attention.

    Args:
        layers, width, ffn, vocab: as in a `config.json`.
        query_width: heads times head size. kv_width: key-value heads times head size.
        has_head: whether the output projection runs (a frozen Thinker under a Talker needs none).
    """

    layers: int
    width: int
    query_width: int
    kv_width: int
    ffn: int
    vocab: int
    has_head: bool = True

    @property
    def layer_parameters(self) -> int:
        """Matmul parameters of one layer."""
        attention = 2 * self.width * self.query_width + 2 * self.width * self.kv_width
        return attention + 3 * self.width * self.ffn

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with, the output projection among them."""
        head = self.vocab * self.width if self.has_head else 0
        return self.layers * self.layer_parameters + head

    def recomputed_share(self, recompute: Recompute) -> float:
        """Share of a layer's products that the backward pass does a second time."""
        if recompute is Recompute.none:
            return 0.0
        if recompute is not Recompute.products:
            return 1.0 if recompute is Recompute.full else 0.5
        # Keys, the attention's output projection and the FFN's second product.
        again = self.width * (self.kv_width + self.query_width + self.ffn)
        return again / self.layer_parameters

    def kept_bytes(self, recompute: Recompute) -> int:
        """Bytes per token that a layer keeps in bf16 for the backward pass, the mean of all."""
        if recompute is Recompute.full:
            return 2 * self.width
        if recompute is Recompute.products:
            # Input, queries, values, attention's output, one FFN product, the layer's sum.
            return 2 * (2 * self.width + 2 * self.query_width + self.kv_width + self.ffn)
        # Input and sum twice with their norms, q and k before and after rotation, v, attention's
        # output; gate, up, the activation and the product.
        kept = 6 * self.width + 3 * self.query_width + 3 * self.kv_width + 4 * self.ffn
        return 2 * kept if recompute is Recompute.none else kept + self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLoad:
    """A decoder and what one micro-step asks of it.

    Args:
        shape: its sizes.
        tokens: of one pack, before sequence parallelism divides it.
        pairs: sum of the squared lengths of the pack's documents.
        gradients: whether gradients go back through it.
        trained: whether its own weights get some; implies `gradients`.
        loss_tokens: tokens that the output projection sees.
    """

    shape: DecoderShape
    tokens: float
    pairs: float
    gradients: bool = True
    trained: bool = True
    loss_tokens: float = 0.0

    @property
    def flops_per_parameter(self) -> int:
        """2 forward, 2 for the gradient of the input, 2 for that of the weight."""
        return 2 + 2 * self.gradients + 2 * self.trained


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLoad:
    """An encoder and what one micro-step asks of it.

    Args:
        name: vision or audio.
        parameters: matmul parameters that each unit is multiplied with.
        units: patches, or frames after the convolutions, of an average pack.
        peak_units: of the pack with most.
        layers, width, ffn: sizes, for the activations.
        trained: whether it gets gradients.
    """

    name: str
    parameters: float
    units: float
    peak_units: float
    layers: int
    width: int
    ffn: int
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A run as the estimates see it.

    Args:
        decoders, encoders: what one micro-step of one rank runs.
        parameters, trained_parameters: of the whole model.
        largest_tensor: elements of its largest weight, which is gathered whole.
        devices, sequence_parallel: how many, and how many share one pack.
        micro_steps: of one global step.
        zero_stage: 1 shards optimiser state, 2 gradients too, 3 weights too.
        bytes_per_value: of weights and activations.
        recompute, offload_activations: see `Recompute`; whether kept inputs go to host memory.
        fused_loss: whether logits are never built whole.
    """

    decoders: tuple[DecoderLoad, ...]
    encoders: tuple[EncoderLoad, ...] = ()
    parameters: float
    trained_parameters: float
    largest_tensor: float
    devices: int
    sequence_parallel: int = 1
    micro_steps: int = 1
    zero_stage: int = 3
    bytes_per_value: int = 2
    recompute: Recompute = Recompute.none
    offload_activations: bool = False
    fused_loss: bool = True

    @property
    def tokens_per_device(self) -> float:
        """Tokens of the main decoder in one micro-step, per device."""
        return self.decoders[0].tokens / self.sequence_parallel
