"""Three tasks at once on easy-VQA, whose pictures and questions are not of moadapt's making.

python -m tests.bench.easy_vqa run FOLDER --seeds 0     # the folder that its authors publish; resumes
python -m tests.bench.easy_vqa nlvr FOLDER              # NLVR's development files, after `run`
python -m tests.bench.easy_vqa table                    # as in docs/results.md
"""

import argparse
import json
from pathlib import Path

import torch

from moadapt.cli.quiet import quiet
from tests.bench.easy_vqa import base, files, mixture, nlvr
from tests.bench.quality import spread

SCORES = {
    "vqa/accuracy": "VQA accuracy",
    "vqa/accuracy, pictures shuffled": "pictures shuffled",
    "vqa/accuracy, question alone": "question alone",
    "grounding/accuracy": "box accuracy",
    "grounding/mean_iou": "mean IoU",
    "captioning/exact_match": "captions exact",
    "captioning/cider_d": "CIDEr-D",
}


def table(out: Path) -> str:
    """Return the scores, mean and standard deviation over seeds.

    Args:
        out: Folder of all runs.
    """
    found = [json.loads(file.read_text())["scores"] for file in sorted(out.glob("*/mixture/record.json"))]
    heads, cells = [*SCORES.values(), "seeds"], [spread([run[name] for run in found], 3) for name in SCORES]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", f"| {' | '.join(cells)} | {len(found)} |"])


def run(folder: Path, seed: int, out: Path) -> None:
    """Make a base and its mixture, or what is lacking of them.

    Args:
        folder: The authors' folder.
        seed: Of everything.
        out: Folder of all runs.
    """
    files.prepare(folder, out / "data")
    own = out / str(seed)
    base.pretrain(folder, out / "data", own / "base", own / "pretraining", seed)
    mixture.fit(folder, out / "data", own / "base", seed, own / "mixture")


def main() -> None:
    """Run, or print what was found."""
    parser = argparse.ArgumentParser(description="Three tasks at once on easy-VQA.")
    parser.add_argument("do", choices=["run", "nlvr", "table"])
    parser.add_argument("folder", type=Path, nargs="?", help="the folder that the data's authors publish")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/easy_vqa"))
    given = parser.parse_args()
    if given.do != "table" and given.folder is None:
        parser.error(f"{given.do} needs the folder of its data")
    quiet()
    torch.set_num_threads(given.threads)
    for seed in given.seeds if given.do != "table" else []:
        if given.do == "run":
            run(given.folder, seed, given.out)
        else:
            nlvr.prepare(given.folder, given.out / "nlvr_data")
            own = given.out / str(seed)
            print(nlvr.fit(given.folder, given.out / "nlvr_data", own / "base", seed, own / "nlvr"))
    print(table(given.out))


if __name__ == "__main__":
    main()
