"""The tables as the newest migration leaves them; a test compares the two.

Decides names and types only; what is read and written is `coordinator.store`'s. Times are milliseconds since 1970.
"""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Boolean, Column, Double, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()

run = Table(
    "run",
    metadata,
    Column("run_id", LargeBinary(20), primary_key=True),
    Column("signed_spec", LargeBinary, nullable=False),
    Column("signed_genesis", LargeBinary, nullable=False),
)

peers = Table(
    "peers",
    metadata,
    Column("key", LargeBinary(32), primary_key=True),
    Column("first_seen_unix_ms", BigInteger, nullable=False),
    Column("last_seen_unix_ms", BigInteger, nullable=False, index=True),
    Column("admitted_until_unix_ms", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),  # contributed, by the signed log
    Column("reported_unix_ms", BigInteger, nullable=False),  # by the peer's clock; 0: never reported
    Column("round", BigInteger, nullable=False),
    Column("state_digest", LargeBinary(32), nullable=False),
    Column("log_digest", LargeBinary(32), nullable=False),
    Column("tokens_per_s", Double, nullable=False),
    Column("bytes_sent", BigInteger, nullable=False),
    Column("bytes_received", BigInteger, nullable=False),
    Column("device", String(64), nullable=False),
    Column("leaving", Boolean, nullable=False),
    Column("first_shard", Integer, nullable=False, server_default="0"),
    Column("num_shards", Integer, nullable=False, server_default="0"),  # of its span; 0: all from the first one on
    Column("service_tokens_per_s", Double, nullable=False, server_default="0"),
    Column("shard_tokens_per_s", JSON, nullable=False, server_default="[]"),  # of its span; none: it does not train
)

reports = Table(
    "reports",
    metadata,
    Column("peer_key", LargeBinary(32), primary_key=True),
    Column("round", BigInteger, primary_key=True, autoincrement=False, index=True),
    Column("train_loss_sum", Double, nullable=False),
    Column("num_train_losses", BigInteger, nullable=False),
    Column("validation_loss", Double, nullable=True),
)

seed_addresses = Table(
    "seed_addresses",
    metadata,
    Column("peer_key", LargeBinary(32), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("address", String(256), nullable=False),
    Column("told_unix_ms", BigInteger, nullable=False),
)

commits = Table(
    "commits",
    metadata,
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("record_digest", LargeBinary(32), nullable=False),
    Column("state_digest", LargeBinary(32), nullable=False),  # that the round started from
    Column("log_digest", LargeBinary(32), nullable=False),  # after the round
    Column("total_tokens", BigInteger, nullable=False),
    Column("absent_parts", Integer, nullable=False),
    Column("recorded_unix_ms", BigInteger, nullable=False),
    Column("commit", LargeBinary, nullable=False),  # serialised Commit
)

contributions = Table(
    "contributions",
    metadata,
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("peer_key", LargeBinary(32), primary_key=True),
    Column("tokens", BigInteger, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("total_tokens", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("manifest_digest", LargeBinary(32), nullable=False),
    Column("published_unix_ms", BigInteger, nullable=False),
    Column("signed_manifest", LargeBinary, nullable=False),  # serialised Signed
    Column("signed_witnesses", LargeBinary, nullable=False),  # serialised Signed
)

attestations = Table(
    "attestations",
    metadata,
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("peer_key", LargeBinary(32), primary_key=True),
    Column("digest", LargeBinary(32), primary_key=True),  # of the payload: who says two things is seen
    Column("signed", LargeBinary, nullable=False),  # serialised Signed
)

incidents = Table(
    "incidents",
    metadata,
    Column("name", String(64), primary_key=True),  # an incident that goes on has one entry, the newest text
    Column("told_unix_ms", BigInteger, nullable=False, index=True),
    Column("text", Text, nullable=False),
    Column("attestations", LargeBinary, nullable=False),  # serialised Incident that holds nothing else
)

introductions = Table(
    "introductions",
    metadata,
    Column("peer_key", LargeBinary(32), primary_key=True),
    Column("name", String(64), nullable=False),  # empty: wants not to be named
    Column("agent", String(64), nullable=False),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("signer", LargeBinary(32), primary_key=True),
    Column("digest", LargeBinary(32), primary_key=True),  # of the payload
    Column("credited", Boolean, nullable=False),  # the signer was known when it told: organizer, seed peer, contributor
    Column("told_unix_ms", BigInteger, nullable=False),
    Column("signed", LargeBinary, nullable=False),  # serialised Signed
)

run_records = Table(
    "run_records",
    metadata,
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("content", LargeBinary, nullable=False),  # run-record.json of the round's checkpoint
)

online_metadata = Table(
    "online_metadata",
    metadata,
    Column("role", String(64), primary_key=True),
    Column("content", LargeBinary, nullable=False),  # a TUF file that the publication key signed
)
