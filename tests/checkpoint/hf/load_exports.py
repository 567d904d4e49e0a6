"""Run by `test_round_trips` in a fresh process: load every exported folder and write down what it computes.

python -m tests.checkpoint.hf.load_exports CASES.json RESULTS.pt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from echo4o.checkpoint.hf.probe import probe_outputs
from echo4o.generate.pipeline import Echo4oPipeline
from tests.checkpoint.hf.drawn import drawn_picture


def main(cases: str, results: str) -> None:
    found = {}
    for case in json.loads(Path(cases).read_text()):
        pipe = Echo4oPipeline.from_pretrained(case["folder"], dtype="float32", device="cpu")
        entry = {"outputs": probe_outputs(pipe.model), "picture": drawn_picture(pipe)}
        if case["remote"]:
            from transformers import AutoModel

            model, report = AutoModel.from_pretrained(
                case["folder"], trust_remote_code=True, dtype=torch.float32, output_loading_info=True
            )
            entry["report"] = {key: sorted(map(str, value)) for key, value in report.items()}
            entry["remote"] = probe_outputs(model.bagel)
            entry["remote_picture"] = drawn_picture(model.pipeline())
        found[case["folder"]] = entry
    torch.save(found, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
