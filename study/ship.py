"""Writes a student or teacher in half precision: `python -m study.ship FILE... FOLDER`.

So the students in weights/ were made: they need half the room, and sample.py opens them as any
other. Where they were trained (folders, device and so on) is left out.
"""

from pathlib import Path

import torch

from config import CIRCUMSTANCES
from harness import UserError, checkpoint
from harness.script import make_parser, run_script


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="student.pt or teacher.pt")
    parser.add_argument("folder", help="where they are written")
    args = parser.parse_args(argv)
    for file in map(Path, args.files):
        out = Path(args.folder, file.name)
        if out.exists():
            raise UserError(f"{out} exists; name another folder")
        content = checkpoint.load(file, ("student", "teacher"))
        content["ema"] = {key: value.half() for key, value in content["ema"].items()}
        content["config"] = {key: value for key, value in content["config"].items()
                             if key not in CIRCUMSTANCES}
        with checkpoint.replacing(out) as target:
            torch.save(content, target)
        print(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
