"""Run a module, and leave the most memory that its process held (Linux): `watched.py KILOBYTES MODULE [WORD ...]`.

What the parent's `wait` says of a child counts what the parent itself held when it started it.
"""

import re
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    left, module = sys.argv[1:3]
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    Path(left).write_text(peak)
