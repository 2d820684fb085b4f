"""Who volunteers in the simulation, on which lines, and for which models.

Decides the figures that nobody measured here, each with where it comes from. Leaves what follows from them to the
program's own planning: `swarm.fitting` says which span a card takes, `swarm.pipeline_plan` how fast it is there.

Homes: median speeds of the six largest providers of fixed broadband in the USA, fourth quarter of 2022, by Ookla
(Speedtest Global Index; potsandpansbyccg.com/tag/ookla), weighted by their subscribers (Leichtman Research, end of
2022, millions). Cards: memory, and dense bf16 operations a second with fp32 sums, from NVIDIA's data sheets; the shares
are ours, after what players own (Steam's hardware survey), without the cards below 8 GiB. Training sustains `SUSTAINED`
of it: an assumption. Sessions: exponential, mean 4 h.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from swarm import fitting, memory_plan, pipeline_plan, presets, sharding
from swarm.memory_plan import ModelNumbers, Working
from swarm.placement import Hosted
from swarm.run_file import RunFile
from swarm.run_spec import Model
from swarm.sharding import Span

SESSION_S = 4 * 3600.0
SUSTAINED = 0.35
VOCABULARY = 32_000
HOP_CODEC = "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    provider: str
    down_bps: float
    up_bps: float
    subscribers_millions: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    name: str
    memory_gib: int
    host_gib: int
    peak_flops: float
    share: float

    @property
    def room(self) -> fitting.Room:
        return fitting.Room(device_bytes=self.memory_gib * fitting.GIB, host_bytes=self.host_gib * fitting.GIB)


HOMES = tuple(
    Home(provider=name, down_bps=down * 1e6, up_bps=up * 1e6, subscribers_millions=millions)
    for name, down, up, millions in (
        ("Comcast", 226.1, 20.4, 32.2),
        ("Charter", 225.3, 11.8, 30.4),
        ("AT&T", 187.1, 142.8, 15.4),
        ("Verizon", 183.2, 104.9, 7.5),
        ("Cox", 212.3, 10.7, 5.6),
        ("Altice", 190.8, 29.8, 4.3),
    )
)
CARDS = tuple(
    Card(name=name, memory_gib=memory, host_gib=host, peak_flops=tflops * 1e12, share=share)
    for name, memory, host, tflops, share in (
        ("RTX 4060", 8, 32, 30.2, 0.30),
        ("RTX 3060", 12, 32, 25.6, 0.25),
        ("RTX 3070", 8, 32, 40.6, 0.15),
        ("RTX 4070", 12, 32, 58.3, 0.15),
        ("RTX 3090", 24, 64, 71.0, 0.05),
        ("RTX 4090", 24, 64, 165.2, 0.10),
    )
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A model as the program sees it. ``takes``: card -> (shards, microbatches in flight), of those that fit any."""

    name: str
    numbers: ModelNumbers
    shards: tuple[Span, ...]
    working: Working
    tokens_per_round: int
    takes: dict[str, tuple[int, int]]

    @functools.cached_property
    def work(self) -> list[float]:
        """Of a token in each shard, in shares of the whole model's."""
        return [flops / self.flops for flops in self._flops()]

    @functools.cached_property
    def flops(self) -> float:
        return float(sum(self._flops()))

    @property
    def tokens_per_microbatch(self) -> int:
        return self.numbers.activations.tokens

    def span(self, hosted: Hosted) -> Span:
        return sharding.join(self.shards[hosted.first : hosted.last])

    def fits(self, card: Card) -> list[Hosted]:
        """All spans that the card could take."""
        size, _ = self.takes.get(card.name, (0, 0))
        return [Hosted(first=i, last=i + size) for i in range(len(self.shards) - size + 1)] if size else []

    def _flops(self) -> list[int]:
        return [pipeline_plan.flops_per_token(self.numbers, shard, self.working) for shard in self.shards]


def sized(name: str, *, layers: int, hidden: int, intermediate: int, key_value_heads: int) -> RunFile:
    """A LLaMA 2 of arXiv 2307.09288 under the rules of the 7-billion preset."""
    rules = presets.preset("mistral-7b", name)
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return rules.model_copy(update={"model": Model(family="llama", config=config)})


def rules_of(name: str) -> RunFile:
    if name in ("1B", "7B"):
        return presets.preset({"1B": "llama-1b", "7B": "mistral-7b"}[name], name.lower())
    if name == "13B":
        return sized("13b", layers=40, hidden=5120, intermediate=13824, key_value_heads=40)
    return sized("70b", layers=80, hidden=8192, intermediate=28672, key_value_heads=8)


def study(name: str, num_shards: int) -> Study:
    """The model called ``name``, cut so."""
    from peer.training import model

    rules = rules_of(name)
    inner = rules.inner.model_copy(update={"checkpoint_activations": True})
    working = fitting.working(inner, "cuda")
    # More than one shard unties embedding and head, and several microbatches make an inner step.
    config = model.build_config(rules.model_copy(update={"num_shards": num_shards}), VOCABULARY)
    numbers = model.measure(config, batch=1, sequence=rules.data.sequence_length, in_bf16=True)
    shards = sharding.split(len(numbers.layers), num_shards, memory_plan.piece_values(numbers))
    takes = {card.name: taken for card in CARDS if (taken := _taken(numbers, shards, working, card))}
    values = numbers.num_values(sharding.whole(len(numbers.layers)))
    return Study(
        name=name,
        numbers=numbers,
        shards=shards,
        working=working,
        # As presets have it: 20 tokens a parameter in a thousand rounds.
        tokens_per_round=20 * values // 1000,
        takes=takes,
    )


def _taken(numbers: ModelNumbers, shards: Sequence[Span], working: Working, card: Card) -> tuple[int, int] | None:
    """The whole model where it fits, else one shard: (shards, microbatches in flight).

    A hop goes on to a span that begins where the last one ended, so spans of several lengths would seldom meet.
    """
    several = replace(working, microbatches=2)
    for size in (len(shards), 1):
        spans = [sharding.join(shards)] if size == len(shards) else shards
        planned = max((memory_plan.plan(numbers, span, several) for span in spans), key=lambda plan: plan.device_bytes)
        if fitting.fits(planned, card.room, several.device):
            choice = fitting.Choice(plan=planned, working=several, batch=1, reason="")
            return size, fitting.in_flight(choice, numbers, card.room)
    return None


def draw_home(rng: random.Random) -> Home:
    return rng.choices(HOMES, [home.subscribers_millions for home in HOMES])[0]


def draw_card(rng: random.Random) -> Card:
    return rng.choices(CARDS, [card.share for card in CARDS])[0]
