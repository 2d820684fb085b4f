"""Digests: RFC 6962's tree, and a state digest that separates anchor and momentum."""

from __future__ import annotations

import hashlib

import pytest

from swarm import digest
from swarm.errors import DigestError

# The reference leaves and roots of RFC 6962's own implementation (certificate-transparency, merkletree tests).
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_rfc_6962(size: int) -> None:
    """Trees of one to eight leaves have the reference roots."""
    assert digest.merkle_root(LEAVES[:size]).hex() == ROOTS[size - 1]


def test_the_empty_tree_is_the_hash_of_nothing() -> None:
    """RFC 6962, section 2.1: MTH({}) = SHA-256()."""
    assert digest.merkle_root([]) == hashlib.sha256(b"").digest()


def test_three_leaves_by_hand() -> None:
    """The odd leaf moves up and is paired on the next level."""
    a, b, c = (hashlib.sha256(b"\x00" + leaf).digest() for leaf in (b"a", b"b", b"c"))
    pair = hashlib.sha256(b"\x01" + a + b).digest()
    assert digest.merkle_root([b"a", b"b", b"c"]) == hashlib.sha256(b"\x01" + pair + c).digest()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("order", [b"b", b"a", b"c"]),
        ("missing", [b"a", b"b"]),
        ("repeated last", [b"a", b"b", b"c", b"c"]),
        ("joined", [b"ab", b"c"]),
        ("inner node as a leaf", [digest.merkle_root([b"a", b"b"]), b"c"]),
    ],
)
def test_other_leaves_have_another_root(name: str, changed: list[bytes]) -> None:
    """No rearrangement of the leaves keeps the root."""
    assert digest.merkle_root(changed) != digest.merkle_root([b"a", b"b", b"c"]), name


def test_chunks_cover_the_bytes_in_order() -> None:
    """Every byte is in one chunk; the last chunk may be shorter."""
    data = bytes(range(10))
    expected = [digest.sha256(data[:4]), digest.sha256(data[4:8]), digest.sha256(data[8:])]
    assert digest.chunk_digests(memoryview(data), 4) == expected


def test_a_state_digest_separates_anchor_and_momentum() -> None:
    """Swapped subtrees, or a chunk moved from one to the other, are another state."""
    state = digest.state_digest([b"a", b"b"], [b"c"])
    assert state == hashlib.sha256(b"\x01" + digest.merkle_root([b"a", b"b"]) + digest.merkle_root([b"c"])).digest()
    assert len({state, digest.state_digest([b"c"], [b"a", b"b"]), digest.state_digest([b"a"], [b"b", b"c"])}) == 3


def test_check_refuses_a_flipped_bit() -> None:
    """Bytes that differ in one bit do not pass for the digest's."""
    digest.check(b"\x00", digest.sha256(b"\x00"), "chunk")
    with pytest.raises(DigestError, match="chunk"):
        digest.check(b"\x01", digest.sha256(b"\x00"), "chunk")


def test_the_log_digest_depends_on_run_shard_and_every_record() -> None:
    """Two logs agree only where they hold the same records of the same shard of the same run."""
    start = digest.log_genesis(b"r" * 20, 0)
    one = digest.extend_log(digest.extend_log(start, b"x"), b"y")
    other_order = digest.extend_log(digest.extend_log(start, b"y"), b"x")
    others = {digest.log_genesis(b"r" * 20, 1), digest.log_genesis(b"s" * 20, 0), other_order}
    assert len({start, one, *others}) == 5
