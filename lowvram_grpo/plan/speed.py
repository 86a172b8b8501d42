"""How long a step would take by what it launches, reads and multiplies: modelled, never measured.

It puts settings into an order, for a planner that has memory to spare, and says nothing about seconds. Counts are of
the code (launches of Qwen2.5 layers under a device that is not there, docs/LOG.md); the time of a launch, and what of a
card's best is reached, are the estimates below. Completions are taken to be half as long as they may be.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_grpo.plan import four_bit
from lowvram_grpo.plan.depth import cut, period_of
from lowvram_grpo.plan.paper import setting
from lowvram_grpo.recipe.weight_offload import streamed_layers
from lowvram_grpo.rollout.graphs import bucket

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowvram_grpo.memory.cards import Card
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.recipe.resolve import Recipe
    from lowvram_grpo.training.rehearsal import Workload

# Seconds: a launch by PyTorch's host code (11,000 are 70 to 90 ms on Linux, more on Windows), a node of a CUDA graph, a
# step that waits for the device and sends it something.
LAUNCH, NODE, WAIT = 7e-6, 2e-6, 60e-6
# Of a card's best: what products and what reading weights reach.
ARITHMETIC, STREAM = 0.5, 0.8
# Launches a layer, and beside the layers.
DECODE, FORWARD, REFERENCE, BACKWARD, BESIDE = 51, 101, 60, 190, 230
# Launches of a tile of a quantized head in a decode step.
TILE = 5
# Bytes a weight of a layer, as it is kept.
_BYTES = {"none": 2.0, "int8": 1.0, "nf4": four_bit.PACKED}
# Bytes a weight that a decode step moves: an int8 head by its kernel, and by tiles that are written and read again.
_INT8, _TILES = 1 + 2 / 64, 4


class Choice(NamedTuple):
    """The settings that a step's time depends on here, under their own names."""

    quantization: str
    head_dtype: str
    embedding_offload: bool
    rollout_batch_size: int
    per_device_train_batch_size: int
    gradient_checkpointing: bool
    workspace_mib: int
    weight_offload: int = 0  # decoder layers


def choice_of(recipe: Recipe, args: GRPOConfig, layers: int) -> Choice:
    """The settings of a recipe as they take effect; `args` are its own, `layers` those of its decoder."""
    plan = args.batch_plan()
    completions = plan.completions_per_rollout
    taken = {
        "rollout_batch_size": min(args.rollout_batch_size or completions, completions),
        "per_device_train_batch_size": plan.micro_batch_size,
        "weight_offload": streamed_layers(args.weight_offload, layers),
    }
    values: list[Any] = [taken[key] if key in taken else setting(recipe, key) for key in Choice._fields]
    return Choice(*values)


@dataclass(frozen=True)
class Shape:
    """What of a model a step moves.

    Attributes:
        linears: (out, in) of a linear layer -> how many there are.
        keys: numbers that a token's keys and values are.
        tied: lm_head is the input embedding.
    """

    layers: int
    linears: Mapping[tuple[int, int], float]
    vocab: int
    width: int
    keys: int
    tied: bool

    @property
    def weights(self) -> float:
        """Numbers in linear layers, lm_head apart."""
        return sum(n * k * count for (n, k), count in self.linears.items())

    @property
    def table(self) -> int:
        """Numbers in lm_head."""
        return self.vocab * self.width


def shape_of(config: PretrainedConfig) -> Shape:
    """Read off a model on meta of as many layers as have kinds of their own."""
    import torch

    from lowvram_grpo.policy.attention import head_sizes
    from lowvram_grpo.policy.stream import skeleton

    text = config.get_text_config()
    depth, period = text.num_hidden_layers, min(period_of(text), text.num_hidden_layers)
    model = skeleton(cut(config, period), torch.bfloat16)
    head = model.get_output_embeddings()
    found: Counter[tuple[int, int]] = Counter()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            n, k = module.weight.shape
            found[n, k] += 1
    vocab, width = head.weight.shape
    tied = bool(getattr(text, "tie_word_embeddings", False))
    linears = {shape: count * depth / period for shape, count in found.items()}
    cached = 2 * sum(heads * size for heads, size in head_sizes(text))
    return Shape(depth, linears, vocab, width, cached, tied)


class Speed:
    """Times of one optimizer step of `args` on a card, by choices of settings.

    Args:
        work: the longest step.
        half: name of the 16-bit dtype.
        int8_kernel: an int8 head is multiplied by its own kernel while sampling.
        trained: all weights are, in float32 under autocast.
    """

    def __init__(
        self, shape: Shape, work: Workload, args: GRPOConfig, card: Card, half: str, *, int8_kernel: bool = False,
        trained: bool = False,
    ):  # fmt: skip
        self.trained, self.streamed = trained, trained and args.beta > 0 and args.reference_offload
        self.shape, self.work, self.card, self.half, self.int8_kernel = shape, work, card, half, int8_kernel
        plan = args.batch_plan()
        self.steps = plan.steps_per_rollout
        self.per_update = -(-work.completions // plan.updates_per_rollout)
        self.reference, self.shared = args.beta > 0, args.shared_prefix != "off"
        self.ranked = args.top_entropy_quantile < 1
        self.elsewhere = args.use_vllm
        self.kv_bytes = 1 if args.kv_cache_dtype == "int8" else 2
        self.length = work.completion / 2
        self._reads, self._flops = card.gbs * 1e9 * STREAM, card.flops * ARITHMETIC
        self._known: dict[tuple, float] = {}

    def step(self, choice: Choice) -> float:
        """Seconds of an optimizer step with its share of the rollout."""
        return self.rollout(choice) / self.steps + self.update(choice)

    def rollout(self, choice: Choice) -> float:
        """Seconds of decoding; prefills are the same whatever is chosen. Rows that end are taken over at once, and the
        last ones go on alone."""
        if self.elsewhere:
            return 0.0
        rows = min(choice.rollout_batch_size, self.work.completions)
        key = (rows, *choice._replace(rollout_batch_size=0, per_device_train_batch_size=0))
        if key not in self._known:
            steps = self.length * (self.work.completions / rows + 1)
            self._known[key] = steps * self.decode(rows, choice)
        return self._known[key]

    def decode(self, rows: int, choice: Choice) -> float:
        """Seconds of one token for each of `rows` completions."""
        shape, width = self.shape, bucket(rows, rows)
        nodes, moved = DECODE * shape.layers + BESIDE / 2, 0.0
        for (n, k), count in shape.linears.items():
            if choice.quantization == "none":
                moved += 2 * n * k * count
                continue
            moved += four_bit.moved(self.card, self.half, width, n, k) * n * k * count
            if not four_bit.packed(self.card, self.half, width, n, k):
                nodes += four_bit.COPY_LAUNCHES * count
        head, launches = self._head(choice)
        prompts = -(-rows // self.work.group)
        moved += head + self.kv_bytes * shape.keys * (rows * self.length / 2 + prompts * self.work.prompt)
        multiplied = 2 * rows * (shape.weights + shape.table) / self._flops
        waits = WAIT if choice.embedding_offload and not shape.tied else 0.0
        own = (nodes + launches) * NODE + max(moved / self._reads, multiplied) + waits
        return max(own, self.over_the_bus(choice))

    def _head(self, choice: Choice) -> tuple[float, int]:
        """(bytes, launches) of lm_head in a decode step."""
        table = self.shape.table
        if choice.head_dtype == "dense":
            return 2.0 * table, 1
        if choice.head_dtype == "int8" and self.int8_kernel:
            return _INT8 * table, 1
        tiles = math.ceil(table * 4 / (choice.workspace_mib * 2**20 * 3 / 4))
        size = _INT8 if choice.head_dtype == "int8" else four_bit.PACKED
        return (size + _TILES) * table, TILE * tiles

    def update(self, choice: Choice) -> float:
        """Seconds of the micro-batches of an optimizer step."""
        size = min(choice.per_device_train_batch_size, self.per_update)
        key = (size, choice.quantization, choice.gradient_checkpointing, choice.weight_offload)
        if key not in self._known:
            whole, rest = divmod(self.per_update, size)
            one = lambda rows: self.micro_batch(rows, choice)
            self._known[key] = whole * one(size) + (one(rest) if rest else 0.0)
        return self._known[key]

    def micro_batch(self, rows: int, choice: Choice) -> float:
        """Seconds of scoring `rows` completions and of their backward pass. What the host launches and what the device
        computes go on at the same time, but for a tenth."""
        shape, again = self.shape, bool(choice.gradient_checkpointing)
        # Where an update has several micro-batches, the entropies of all of them come first.
        ranked = self.ranked and rows < self.per_update
        forward = FORWARD * (1 + again + ranked)
        launches: float = shape.layers * (forward + REFERENCE * self.reference + BACKWARD) + BESIDE
        passes = 2 + self.reference + again + ranked + self.trained  # which have gradients of their own
        moved = (4.0 if self.trained else 2.0) * shape.weights * passes
        if choice.quantization != "none":
            moved = four_bit.COPIED * shape.weights * passes
            launches += four_bit.COPY_LAUNCHES * passes * sum(shape.linears.values())
        head = rows * self.length * shape.table * (2 + self.reference + ranked)
        multiplied = 2 * (self.tokens(rows, self.length) * shape.weights * passes + head) / self._flops
        host, device = launches * LAUNCH, multiplied + moved / self._reads
        if self.streamed:
            device += self.exposed(rows)
        own = max(host, device) + 0.1 * min(host, device)
        # Layers come again for the backward pass, where they are recomputed and read once more.
        return max(own, (2 + self.reference + ranked) * self.over_the_bus(choice))

    def layer_bytes(self, choice: Choice) -> float:
        """Of a streamed layer."""
        return self.shape.weights / self.shape.layers * _BYTES[choice.quantization]

    def over_the_bus(self, choice: Choice) -> float:
        """Seconds that the streamed layers of a pass are on their way."""
        return choice.weight_offload * self.layer_bytes(choice) / self.card.bus

    @property
    def streamed_bytes(self) -> float:
        """That a pass of a streamed reference brings to the card: its layers and lm_head, in float32."""
        return 4.0 * (self.shape.weights + self.shape.table)

    def exposed(self, rows: int) -> float:
        """Seconds that a pass of a streamed reference over `rows` completions is longer than one on the card: what its
        own products do not hide. Layers arrive beside them, tiles of lm_head before them."""
        over = 4 * self.shape.weights / self.card.bus
        beside = 2 * self.tokens(rows, self.length) * self.shape.weights / self._flops
        return max(0.0, over - beside) + 4 * self.shape.table / self.card.bus

    def tokens(self, rows: int, length: float) -> float:
        """That go through the decoder in a micro-batch of completions of this length."""
        prompts = -(-rows // self.work.group) if self.shared else rows
        return prompts * self.work.prompt + rows * length
