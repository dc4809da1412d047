"""A mixture of data sets: an endless stream that visits each in its own order, by rates, and that can be continued.

    sources = [Source("points", points, "pointing"), Source("captions", captions, "demo")]
    mixture = Mixture(sources, {"pointing": 1, "demo": 2})

What is drawn depends on the seed and the number of the draw alone, so every process can find its share without talking
to the others, and a stream continues from its state with the very next example.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Shares of the groups in the fine-tuning mixture of the released training script; they add up to 1.1.
SFT_GROUPS = {
    "demo": 0.15,
    "video_academic": 0.20,
    "image_academic": 0.25,
    "tracking": 0.15,
    "video_pointing": 0.15,
    "image_pointing": 0.10,
    "nlp": 0.10,
}


@dataclass(frozen=True)
class Source:
    """A data set of a mixture.

    Attributes:
        name: Unique in the mixture.
        examples: A sequence, such as `Examples`; its attribute `epoch`, if any, is set before an example is taken.
        group: The group whose share it has a part of.
        size: The number of examples that it counts as; None for its own. The `root_size_factor` of the trainer.
    """

    name: str
    examples: Sequence[Any]
    group: str = ""
    size: float | None = None


class Drawn(NamedTuple):
    """Where an example comes from: the source, the place in it, and how often the source was gone through before."""

    source: str
    place: int
    epoch: int


@dataclass
class MixtureState:
    """How far a stream is: the number of draws, and how many of them each source had."""

    draws: int = 0
    taken: dict[str, int] = field(default_factory=dict)


def mixture_rates(sources: Sequence[Source], groups: Mapping[str, float] | None = None) -> dict[str, float]:
    """The probability of each source: the share of its group, divided in proportion to sqrt(size).

    Args:
        groups: Shares of the groups, which need not add up to 1. None: all sources are one group.
    Raises:
        ValueError: There are no sources, names repeat, a source is empty, or a group has no share or no source.
    """
    names = [source.name for source in sources]
    if not sources or len(set(names)) != len(names):
        raise ValueError(f"A mixture needs sources with names of their own; found {names}.")
    roots = {}
    for source in sources:
        size = len(source.examples) if source.size is None else source.size
        if not len(source.examples) or not size > 0:
            raise ValueError(
                f"The source {source.name!r} has {len(source.examples)} examples and counts as {size}; expected more "
                "than 0. Leave it out, or look at its report."
            )
        roots[source.name] = size**0.5
    members = {source.name: source.group if groups is not None else "" for source in sources}
    shares = {"": 1.0} if groups is None else dict(groups)
    wrong = sorted(set(members.values()) ^ set(shares))
    if wrong or not all(share > 0 for share in shares.values()):
        raise ValueError(
            f"Groups and shares do not fit: {wrong} is only in one of the sources, with groups "
            f"{sorted(set(members.values()))}, and the shares {shares}; expected a share above 0 for each."
        )
    in_group = {group: sum(roots[name] for name in names if members[name] == group) for group in shares}
    total = sum(shares.values())
    return {name: shares[members[name]] / total * roots[name] / in_group[members[name]] for name in names}


class Mixture:
    """An endless stream of examples from several sources.

    Each source is gone through in an order drawn anew for every epoch, so that none of its examples is seen twice
    before all are seen once.

    Args:
        sources, groups: As for `mixture_rates`.
        seed: Of the order.
    Attributes:
        rates: The probability of each source.
    """

    def __init__(self, sources: Sequence[Source], groups: Mapping[str, float] | None = None, *, seed: int = 0):
        self.rates = mixture_rates(sources, groups)
        self.sources = {source.name: source.examples for source in sources}
        self.seed = seed
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def draws(self, state: MixtureState) -> Iterator[Drawn]:
        """Draws behind a state, which is kept up to date."""
        names, rates = list(self.rates), list(self.rates.values())
        while True:
            (name,) = random.Random(f"{self.seed} {state.draws}").choices(names, rates)
            epoch, place = divmod(state.taken.get(name, 0), len(self.sources[name]))
            state.draws += 1
            state.taken[name] = state.taken.get(name, 0) + 1
            yield Drawn(name, self._order(name, epoch)[place], epoch)

    def example(self, drawn: Drawn) -> Any:
        """The example of a draw."""
        source = self.sources[drawn.source]
        if hasattr(source, "epoch"):
            source.epoch = drawn.epoch
        return source[drawn.place]

    def __iter__(self) -> Iterator[Any]:
        return (self.example(drawn) for drawn in self.draws(MixtureState()))

    def fingerprint(self) -> dict[str, Any]:
        """What has to be the same for a stream to be continued."""
        return {
            "seed": self.seed,
            "rates": self.rates,
            "sizes": {name: len(own) for name, own in self.sources.items()},
        }

    def _order(self, name: str, epoch: int) -> list[int]:
        """The order of a source in an epoch; the last one is remembered."""
        if name not in self._orders or self._orders[name][0] != epoch:
            order = list(range(len(self.sources[name])))
            random.Random(f"{self.seed} {name} {epoch}").shuffle(order)
            self._orders[name] = (epoch, order)
        return self._orders[name][1]
