"""How a model is cut: by rules that everybody applies alike."""

from __future__ import annotations

import itertools

import pytest

from swarm.errors import SpecError, SwarmError
from swarm.sharding import PieceValues, Span, from_sizes, join, spans, split, whole

# name, layers, shards, values (layer, embedding, head), layers per shard
CUTS = [
    ("one shard is the whole model", 12, 1, (10, 50, 50), [12]),
    ("layers alike are shared out, the first shards have one more", 7, 3, (10, 0, 0), [3, 2, 2]),
    ("who has the embedding has fewer layers", 8, 2, (10, 20, 0), [3, 5]),
    ("who has the head too", 9, 3, (10, 30, 30), [2, 5, 2]),
    ("ends heavier than all layers still have a layer each", 4, 3, (1, 100, 100), [1, 2, 1]),
    ("as many shards as layers", 5, 5, (10, 99, 1), [1, 1, 1, 1, 1]),
]


@pytest.mark.parametrize(("name", "layers", "shards", "values", "sizes"), CUTS, ids=[case[0] for case in CUTS])
def test_a_cut(name: str, layers: int, shards: int, values: tuple[int, int, int], sizes: list[int]) -> None:
    pieces = PieceValues(layer=values[0], embedding=values[1], head=values[2])
    assert [span.size for span in split(layers, shards, pieces)] == sizes


def test_no_other_cut_has_a_smaller_largest_shard() -> None:
    for layers, shards, embedding, head in itertools.product(range(1, 8), range(1, 5), (0, 7, 25), (0, 12)):
        if shards > layers:
            continue

        def largest(sizes: tuple[int, ...], embedding: int = embedding, head: int = head) -> int:
            weights = [10 * size for size in sizes]
            weights[0] += embedding
            weights[-1] += head
            return max(weights)

        every = (sizes for sizes in itertools.product(range(1, layers + 1), repeat=shards) if sum(sizes) == layers)
        found = split(layers, shards, PieceValues(layer=10, embedding=embedding, head=head))
        assert largest(tuple(span.size for span in found)) == min(map(largest, every))


def test_the_first_span_has_the_embedding_and_the_last_the_head() -> None:
    first, middle, last = from_sizes((2, 1, 3))
    assert [(span.has_embedding, span.has_head) for span in (first, middle, last)] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert [str(span) for span in (first, middle, last)] == ["layers 0-1 + embedding", "layer 2", "layers 3-5 + head"]
    assert whole(6).is_whole and join((first, middle, last)) == whole(6)


def test_the_spans_of_shards_are_all_their_runs() -> None:
    shards = from_sizes((1, 2, 3))
    assert [(span.first, span.last) for span in spans(shards)] == [(0, 1), (1, 3), (3, 6), (0, 3), (1, 6), (0, 6)]


@pytest.mark.parametrize("num_shards", [0, -1, 5, 10**6])
def test_a_cut_into_more_shards_than_layers_is_refused(num_shards: int) -> None:
    with pytest.raises(SpecError, match=f"4 layers cannot be cut into {num_shards} shards"):
        split(4, num_shards, PieceValues(layer=1))


@pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 1), (-1, 2), (0, 5), (4, 5)])
def test_a_span_outside_the_model_is_refused(first: int, last: int) -> None:
    with pytest.raises(SwarmError, match="no span of a model of 4 layers"):
        Span(first=first, last=last, num_layers=4)


@pytest.mark.parametrize("order", [(), (0, 2), (1, 0)])
def test_shards_that_are_no_neighbours_make_no_span(order: tuple[int, ...]) -> None:
    shards = from_sizes((1, 1, 1))
    with pytest.raises(SwarmError, match="neighbouring"):
        join([shards[number] for number in order])
