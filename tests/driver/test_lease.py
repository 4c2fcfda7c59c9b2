"""An engine whose client is silent ends, with its process."""

import subprocess
import sys

CODE = """
import time
from shoal.driver.lease import Lease

began = time.monotonic()
lease = Lease(1.0, lambda: print(f"ended after {time.monotonic() - began:.1f}", flush=True))
for _ in range(10):
    time.sleep(0.2)
    lease.renew()
print("renewed", flush=True)
time.sleep(60)
print("still here", flush=True)
"""


def test_it_ends_when_it_is_not_renewed():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=50)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "renewed"
    assert float(second.removeprefix("ended after ")) >= 2.9
    assert "nobody asked for results for 1 s" in result.stderr
