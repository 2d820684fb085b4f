"""What every store of the coordinator must do; a test file subclasses this once per database."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from coordinator.published import AttestationRow, CheckpointRow, IncidentRow
from coordinator.store import MAX_REPORTS_PER_PEER, Losses, NewCommit, ReportRow, RoundRow, Store
from swarm.errors import ConfigError, ResourceError, VerificationError

ANNA, BORIS = b"a" * 32, b"b" * 32
REPORT = ReportRow(
    reported_unix_ms=5,
    round=3,
    state_digest=b"s" * 32,
    log_digest=b"l" * 32,
    tokens_per_s=1.5,
    bytes_sent=2**53,
    bytes_received=1,
    device="cpu",
    leaving=True,
    train_loss=2.0,
    validation_loss=None,
    first_shard=1,
    num_shards=2,
    service_tokens_per_s=9.5,
    shard_tokens_per_s=(1.0, 1.5),
)


def new_commit(number: int, tokens: dict[bytes, int] | None = None) -> NewCommit:
    row = RoundRow(
        shard=0,
        round=number,
        record_digest=b"%032d" % number,
        state_digest=b"s" * 32,
        log_digest=b"l" * 32,
        total_tokens=2**63 - 1,
        absent_parts=1,
        recorded_unix_ms=number * 10,
    )
    return NewCommit(row=row, commit=b"commit %d" % number, tokens={ANNA: 5} if tokens is None else tokens)


def checkpoint(number: int) -> CheckpointRow:
    return CheckpointRow(
        round=number,
        total_tokens=1,
        size_bytes=2,
        manifest_digest=b"m" * 32,
        published_unix_ms=3,
        signed_manifest=b"signed %d" % number,
        signed_witnesses=b"witnesses",
    )


class StoreContract:
    """Subclasses say in ``url`` where an empty database is."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        opened = Store(url)
        yield opened
        opened.close()

    def test_what_was_written_is_there_after_opening_again(self, url: str) -> None:
        first = Store(url)
        first.bind_run(b"r" * 20, b"spec", b"genesis")
        first.admit(ANNA, 100, 1, 10)
        first.append([new_commit(1)])
        first.close()
        second = Store(url)
        second.bind_run(b"r" * 20, b"spec", b"genesis")
        peer = second.peer(ANNA)
        assert peer is not None
        assert (peer.admitted_until_unix_ms, peer.tokens) == (100, 5)
        assert second.commit(0, 1) == b"commit 1"
        second.close()

    @pytest.mark.parametrize(
        "other",
        [(b"q" * 20, b"spec", b"genesis"), (b"r" * 20, b"SPEC", b"genesis"), (b"r" * 20, b"spec", b"GENESIS")],
        ids=["another run", "another spec", "another genesis"],
    )
    def test_a_database_belongs_to_one_run(self, store: Store, other: tuple[bytes, bytes, bytes]) -> None:
        store.bind_run(b"r" * 20, b"spec", b"genesis")
        with pytest.raises(ConfigError, match="another run"):
            store.bind_run(*other)

    def test_an_unknown_peer_is_none(self, store: Store) -> None:
        assert store.peer(ANNA) is None

    def test_admission_is_renewed_without_forgetting_the_first_time(self, store: Store) -> None:
        store.admit(ANNA, 100, 1, 10)
        store.admit(ANNA, 200, 50, 10)
        peer = store.peer(ANNA)
        assert peer is not None
        assert (peer.first_seen_unix_ms, peer.last_seen_unix_ms, peer.admitted_until_unix_ms) == (1, 50, 200)

    def test_a_full_table_forgets_expired_peers_that_never_contributed(self, store: Store) -> None:
        store.admit(ANNA, 100, 1, 2)
        store.append([new_commit(1)])
        store.admit(BORIS, 100, 1, 2)
        with pytest.raises(ResourceError, match="its limit"):
            store.admit(b"c" * 32, 150, 99, 2)
        store.admit(b"c" * 32, 300, 101, 2)
        assert store.peer(BORIS) is None
        assert store.peer(ANNA) is not None

    def test_a_report_is_the_peers_latest_word(self, store: Store) -> None:
        store.admit(ANNA, 100, 1, 10)
        store.report(ANNA, REPORT, 7)
        peer = store.peer(ANNA)
        assert peer is not None
        assert (peer.round, peer.bytes_sent, peer.leaving, peer.last_seen_unix_ms) == (3, 2**53, True, 7)
        assert (peer.state_digest, peer.log_digest) == (REPORT.state_digest, REPORT.log_digest)
        assert (peer.service_tokens_per_s, list(peer.shard_tokens_per_s)) == (9.5, [1.0, 1.5])
        assert [peer.trains(shard) for shard in range(4)] == [False, True, True, False]

    def test_losses_are_means_over_peers_and_medians(self, store: Store) -> None:
        for key, train, validation in [(ANNA, 2.0, 1.0), (ANNA, 4.0, 3.0), (BORIS, 7.0, None), (b"c" * 32, None, 9.0)]:
            store.report(key, replace(REPORT, train_loss=train, validation_loss=validation), 1)
        assert store.losses(3, 3) == {3: Losses(train=5.0, validation=6.0)}
        assert store.losses(4, 9) == {}

    def test_only_the_newest_rounds_of_a_peers_reports_are_kept(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert MAX_REPORTS_PER_PEER >= 1000
        monkeypatch.setattr("coordinator.store.MAX_REPORTS_PER_PEER", 3)
        store.report(BORIS, replace(REPORT, round=1), 1)
        for number in range(1, 7):
            store.report(ANNA, replace(REPORT, round=number), 1)
        assert sorted(store.losses(0, 100)) == [1, 4, 5, 6]

    def test_seed_addresses_are_replaced_per_peer_and_newest_come_first(self, store: Store) -> None:
        store.set_seed_addresses(ANNA, ["/old/1", "/old/2"], 1)
        store.set_seed_addresses(BORIS, ["/b"], 2)
        store.set_seed_addresses(ANNA, ["/new/1", "/new/2"], 3)
        assert store.seed_addresses(16) == ["/new/1", "/new/2", "/b"]
        assert store.seed_addresses(1) == ["/new/1"]

    def test_commits_come_back_in_order_with_their_shares(self, store: Store) -> None:
        store.append([new_commit(1), new_commit(2, {ANNA: 7, BORIS: 9})])
        store.append([new_commit(3, {})])
        assert store.commits(0, 2, 10) == [(2, b"commit 2"), (3, b"commit 3")]
        assert store.commits(0, 1, 1) == [(1, b"commit 1")]
        assert store.round(0, 2) == new_commit(2).row
        assert [row.round for row in store.newest_rounds(0, 2)] == [2, 3]
        assert store.shares(0, 2, 3) == {2: {ANNA: 7, BORIS: 9}}
        assert (store.round(0, 4), store.commit(0, 4), store.commit(1, 1)) == (None, None, None)

    def test_tokens_add_up_over_rounds(self, store: Store) -> None:
        store.append([new_commit(1), new_commit(2, {ANNA: 7, BORIS: 9})])
        assert {peer.key: peer.tokens for peer in store.newest_peers(10)} == {ANNA: 12, BORIS: 9}

    def test_rounds_are_replaced_with_what_they_credited(self, store: Store) -> None:
        store.append([new_commit(1), new_commit(2, {ANNA: 7, BORIS: 9}), new_commit(3, {BORIS: 9})])
        store.replace_from(2, [new_commit(2, {ANNA: 1})])
        assert store.shares(0, 1, 9).keys() == {1, 2} and store.shares(0, 2, 2) == {2: {ANNA: 1}}
        assert [row.round for row in store.newest_rounds(0, 9)] == [1, 2]
        assert {peer.key: peer.tokens for peer in store.newest_peers(10)} == {ANNA: 6, BORIS: 0}

    def test_appending_is_all_or_none(self, store: Store) -> None:
        store.append([new_commit(2)])
        with pytest.raises(VerificationError):
            store.append([new_commit(1), new_commit(2)])
        assert store.commit(0, 1) is None
        assert {peer.key: peer.tokens for peer in store.newest_peers(10)} == {ANNA: 5}

    def test_newest_peers_are_bounded_and_by_last_seen(self, store: Store) -> None:
        for position in range(5):
            store.admit(bytes([position]) * 32, 100, position, 10)
        assert [peer.key[0] for peer in store.newest_peers(3)] == [4, 3, 2]

    def test_checkpoints_are_one_per_round_and_newest_first(self, store: Store) -> None:
        store.published.add_checkpoint(checkpoint(2), {"timestamp": b"1"})
        store.published.add_checkpoint(checkpoint(10), {"timestamp": b"2"})
        with pytest.raises(VerificationError):
            store.published.add_checkpoint(replace(checkpoint(10), signed_manifest=b"another"), {"timestamp": b"3"})
        assert [row.round for row in store.published.newest_checkpoints(5)] == [10, 2]
        assert store.published.checkpoint(10) == checkpoint(10)
        assert store.published.checkpoint(3) is None
        assert store.published.metadata() == {"timestamp": b"2"}

    def test_what_a_replica_attests_is_kept_once_and_within_bounds(self, store: Store) -> None:
        rows = [AttestationRow(round=2, peer_key=b"a" * 32, digest=bytes([n]) * 32, signed=b"s") for n in range(3)]
        for row in (rows[0], rows[0], rows[1], rows[2]):
            store.published.add_attestation(row, most_per_peer=2)
        other = AttestationRow(round=2, peer_key=b"b" * 32, digest=b"d" * 32, signed=b"t")
        store.published.add_attestation(other, most_per_peer=2)
        assert store.published.attestations(2, 10) == [rows[0], rows[1], other]
        assert store.published.attestations(3, 10) == []

    def test_an_incident_has_its_newest_text_and_the_oldest_are_forgotten(self, store: Store) -> None:
        for number, name in enumerate(["a", "b", "a", "c"]):
            row = IncidentRow(name=name, told_unix_ms=number, text=f"text {number}", attestations=b"")
            store.published.tell_incident(row, most=2)
        found = [(row.name, row.text) for row in store.published.newest_incidents(10)]
        assert found == [("c", "text 3"), ("a", "text 2")]
