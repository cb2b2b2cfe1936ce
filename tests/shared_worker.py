"""The worker of a training whose model two processes share by FSDP2 without GPUs: `dpalign.pipeline.worker` elsewhere.

torchrun ... shared_worker.py RUN STEP      RUN/../STEP.RANK.json are the types of the gradients that were summed
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from dpalign.pipeline import worker
from spread_work import share_on_a_cpu, sharing


def main(run: str, step: str) -> None:
    os.environ.update(sharing())
    share_on_a_cpu()
    types: set[str] = set()
    distributed: Any = torch.distributed
    reduce = distributed.reduce_scatter_single

    def noted(*given: Any, **named: Any) -> Any:
        types.update(str(x.dtype) for x in (*given, *named.values()) if torch.is_tensor(x))
        return reduce(*given, **named)

    distributed.reduce_scatter_single = noted
    worker.main(run, step)
    (Path(run).parent / f"{step}.{os.environ['RANK']}.json").write_text(json.dumps(sorted(types)))


if __name__ == "__main__":
    main(*sys.argv[1:])
