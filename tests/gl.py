"""For tests that render: they are skipped where the GL library is missing, and fail there if CI=true on Linux."""

import functools
import os
import sys
from unittest.mock import patch

import pytest

import common
import robot_tasks


@functools.cache
def why_not(name: str) -> str:
    """Return one sentence that says why `name` ("egl" or "osmesa"; "": any) cannot render here, "" if it can."""
    packages = " (or ".join([robot_tasks.GL_PACKAGES[name]] if name else robot_tasks.GL_PACKAGES.values())
    with patch.dict(os.environ, {"MUJOCO_GL": name} if name else {}):
        try:
            robot_tasks.gl_name.__wrapped__()
        except common.UserError as error:
            return f"on Debian or Ubuntu, apt install {packages}{')' * (not name)} for this test: {error}"
    return ""


def require_gl(*names: str) -> None:
    """Skip the test that calls this unless all of these ("egl", "osmesa"), or any if none is named, can render here."""
    required = os.environ.get("CI") == "true" and sys.platform == "linux"  # elsewhere there is neither EGL nor OSMesa
    for reason in filter(None, map(why_not, names or ("",))):
        pytest.fail(reason) if required else pytest.skip(reason)
