"""One thread for each process, set before any parallel region runs: multi-process tests
fork from this process.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Every command that a test starts, in any folder, uses this checkout, whether or not it is installed.
ROOT = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))

import hypothesis  # noqa: E402
import pytest  # noqa: E402

import tests.distributed  # noqa: E402,F401  (imports torch and megatron-core once, patched for CPU)
from tests.tiny import build_files  # noqa: E402

# No test measures time: a busy machine is not a failure.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder with the files of a complete tiny job."""
    folder = tmp_path_factory.mktemp("tiny")
    build_files(folder)
    return folder


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder for temporary files that may contain sockets: a socket's path has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="simct", dir="/tmp") as folder:
        yield Path(folder)
