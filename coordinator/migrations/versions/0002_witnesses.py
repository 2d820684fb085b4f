"""Witnesses: attestations, the quorum beside each checkpoint, and incidents.

A checkpoint that was published without witnesses cannot be told from a forged one by those who check the quorum: it is
forgotten here, and its seed peer publishes it anew.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.drop_table("checkpoints")
    op.create_table(
        "checkpoints",
        sa.Column("round", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("total_tokens", sa.BigInteger, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("manifest_digest", sa.LargeBinary(32), nullable=False),
        sa.Column("published_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("signed_manifest", sa.LargeBinary, nullable=False),
        sa.Column("signed_witnesses", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "attestations",
        sa.Column("round", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("peer_key", sa.LargeBinary(32), primary_key=True),
        sa.Column("digest", sa.LargeBinary(32), primary_key=True),
        sa.Column("signed", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "incidents",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("told_unix_ms", sa.BigInteger, nullable=False, index=True),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("attestations", sa.LargeBinary, nullable=False),
    )
