"A device that is not the CPU, emulated; a process for each script, since a kind is registered for good."

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot emulate a device in Python",
)


@pytest.mark.parametrize("script", ["no_float64.py", "on_device.py"])
def test_an_emulated_device(script):
    "Solvers without float64; heads, metrics and whole runs where host and device must not mix."
    path = Path(__file__).with_name(script)
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", path], check=True)
