"""A whole comparison on a tiny model: every system of Table 1 from training to page, once unbroken and once killed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import MICRO
from dpalign.pipeline import align
from dpalign.recipe import load
from dpalign.run.ledger import read_ledger

KNOBS = ["--compare.dpo_betas", "[0.1, 0.5]", "--compare.rsf_directions", "2", "--compare.ablations", '["no replay"]']
RUN = """
import sys
from pathlib import Path
from dpalign import align
from dpalign.recipe import load
align.execute(load(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2]), compared=True)
"""


def digests(run: Path) -> dict[str, str]:
    """Of every stage but the report, which tells seconds."""
    names = [step.name for step in align.steps(load(MICRO, KNOBS), compared=True) if step.kind != "report"]
    return {name: read_ledger(run / name)["digest"] for name in names}


@pytest.mark.slow
def test_a_comparison_ends_in_a_report_of_every_system_and_a_killed_one_with_the_same_bytes(
    micro_run: Path, tmp_path: Path
) -> None:
    whole, killed = (Path(shutil.copytree(micro_run, tmp_path / name)) for name in ("whole", "killed"))
    align.execute(load(MICRO, KNOBS), whole, compared=True)
    told = json.loads((whole / "report" / "summary.json").read_text())
    assert {
        *("SFT", "SteerLM", "DPO", "SFT, asked to be brief", "DPO, asked to be brief", "SteerLM, tuned"),
        *("RSF at helpfulness*1.00 - verbosity*0.00", "RSF at helpfulness*0.71 - verbosity*0.71"),
        *("GRPO at helpfulness*1.00 - verbosity*0.00", "GRPO at helpfulness*0.71 - verbosity*0.71"),
        *("rewarded soups", "SFT, best of 16", "DPA t=2", "DPA t=2, no replay"),
    } <= told["systems"].keys()
    for system in ("DPO", "SteerLM, tuned", "rewarded soups"):
        assert sum(trial["chosen"] for trial in told["comparison"]["tuning"][system]) == 1
    assert len(told["systems"]["rewarded soups"]["points"]) == len(told["systems"]["SFT, best of 16"]["points"]) == 4

    command = [sys.executable, "-c", RUN, str(MICRO), str(killed), *KNOBS]
    with (tmp_path / "said.txt").open("w") as said:
        for name in ("dpo-2", "rl-2-1", "evaluate-soup-1"):
            process = subprocess.Popen(command, stderr=said)
            while process.poll() is None and not (killed / f"{name}.partial").exists() and not (killed / name).exists():
                time.sleep(0.01)
            time.sleep(0.3)
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(command, stderr=said, check=True)
    assert digests(killed) == digests(whole)
