"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


def existing(path: Path, what: str) -> Path:
    if not path.exists():
        pytest.skip(f"{what} is not at {path}")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden numbers (what published code itself returns)."""
    path = os.environ.get("PERCEPTION_GOLDEN", PROJECT.parent / "shared" / "golden" / "dev")
    return existing(Path(path), "the folder of golden numbers (PERCEPTION_GOLDEN)")


@pytest.fixture(scope="session")
def real_keyframe() -> Path:
    """One real nuScenes keyframe: images, LiDAR sweep, boxes and the map around it."""
    return existing(PROJECT.parent / "shared" / "data" / "real_keyframe", "the real keyframe")


@pytest.fixture(scope="session")
def town_root(tmp_path_factory) -> Path:
    """A small generated dataset: 2 scenes of 4 keyframes, images 128 x 224."""
    from perception.synthetic import simulate

    root = tmp_path_factory.mktemp("town")
    simulate(root, scenes=2, seed=11, keyframes=4, image_size=(128, 224), workers=1)
    return root
