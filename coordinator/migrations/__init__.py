"""The database's versions, one file each; `coordinator.store` applies them at opening."""
