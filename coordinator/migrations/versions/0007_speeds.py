"""How fast a peer trains each shard of its span, and how fast it could, by its reports."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("peers", sa.Column("service_tokens_per_s", sa.Double, nullable=False, server_default="0"))
    op.add_column("peers", sa.Column("shard_tokens_per_s", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    op.drop_column("peers", "shard_tokens_per_s")
    op.drop_column("peers", "service_tokens_per_s")
