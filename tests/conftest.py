"""What holds for all tests: an example of a property may take as long as a busy machine needs for it."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("swarmtrain", deadline=None)
hypothesis.settings.load_profile("swarmtrain")
