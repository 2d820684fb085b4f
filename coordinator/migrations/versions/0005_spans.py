"""Which shards a peer hosts, by its reports."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("peers", sa.Column("first_shard", sa.Integer, nullable=False, server_default="0"))
    op.add_column("peers", sa.Column("num_shards", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("peers", "num_shards")
    op.drop_column("peers", "first_shard")
