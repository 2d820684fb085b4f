"""The first tables: run, peers, commits, contributions, reports, checkpoints, seed addresses."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_KEY = sa.LargeBinary(32)
_DIGEST = sa.LargeBinary(32)


def upgrade() -> None:
    _run_and_peers()
    _log()
    op.create_table(
        "checkpoints",
        sa.Column("round", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("total_tokens", sa.BigInteger, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("manifest_digest", _DIGEST, nullable=False),
        sa.Column("published_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("signed_manifest", sa.LargeBinary, nullable=False),
    )


def _run_and_peers() -> None:
    op.create_table(
        "run",
        sa.Column("run_id", sa.LargeBinary(20), primary_key=True),
        sa.Column("signed_spec", sa.LargeBinary, nullable=False),
        sa.Column("signed_genesis", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "peers",
        sa.Column("key", _KEY, primary_key=True),
        sa.Column("first_seen_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("last_seen_unix_ms", sa.BigInteger, nullable=False, index=True),
        sa.Column("admitted_until_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("reported_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("round", sa.BigInteger, nullable=False),
        sa.Column("state_digest", _DIGEST, nullable=False),
        sa.Column("log_digest", _DIGEST, nullable=False),
        sa.Column("tokens_per_s", sa.Double, nullable=False),
        sa.Column("bytes_sent", sa.BigInteger, nullable=False),
        sa.Column("bytes_received", sa.BigInteger, nullable=False),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("leaving", sa.Boolean, nullable=False),
    )
    op.create_table(
        "reports",
        sa.Column("peer_key", _KEY, primary_key=True),
        sa.Column("round", sa.BigInteger, primary_key=True, autoincrement=False, index=True),
        sa.Column("train_loss_sum", sa.Double, nullable=False),
        sa.Column("num_train_losses", sa.BigInteger, nullable=False),
        sa.Column("validation_loss", sa.Double, nullable=True),
    )
    op.create_table(
        "seed_addresses",
        sa.Column("peer_key", _KEY, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("address", sa.String(256), nullable=False),
        sa.Column("told_unix_ms", sa.BigInteger, nullable=False),
    )


def _log() -> None:
    op.create_table(
        "commits",
        sa.Column("shard", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("round", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("record_digest", _DIGEST, nullable=False),
        sa.Column("state_digest", _DIGEST, nullable=False),
        sa.Column("log_digest", _DIGEST, nullable=False),
        sa.Column("total_tokens", sa.BigInteger, nullable=False),
        sa.Column("absent_parts", sa.Integer, nullable=False),
        sa.Column("recorded_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("commit", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "contributions",
        sa.Column("shard", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("round", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("peer_key", _KEY, primary_key=True),
        sa.Column("tokens", sa.BigInteger, nullable=False),
    )
