"""What people measured on published checkpoints, signed by them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "evaluations",
        sa.Column("round", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("signer", sa.LargeBinary(32), primary_key=True),
        sa.Column("digest", sa.LargeBinary(32), primary_key=True),
        sa.Column("credited", sa.Boolean, nullable=False),
        sa.Column("told_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("signed", sa.LargeBinary, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("evaluations")
