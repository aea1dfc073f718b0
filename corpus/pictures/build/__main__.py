"""`python -m corpus.pictures.build DIR`: writes the pictures, the index and NOTICE."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from corpus.pictures import FOLDER
from corpus.pictures.build import flags, maps, notice, photos


def main(packages: Path) -> None:
    """Makes everything anew from the unpacked `packages`; nothing is replaced before all of it is made."""
    made = list(chain(flags.make(packages), maps.make(packages), photos.make(packages)))
    for folder in ("flags", "maps", "photos"):
        shutil.rmtree(FOLDER / folder, ignore_errors=True)
        (FOLDER / folder).mkdir()
    for picture, data in made:
        (FOLDER / picture.file).write_bytes(data)
    index = [picture for picture, _ in made]
    lines = (json.dumps(asdict(picture), ensure_ascii=False) + "\n" for picture in index)
    (FOLDER / "index.jsonl").write_text("".join(lines), encoding="utf-8")
    notice.write(index)
    print(f"{len(made)} pictures, {sum(len(data) for _, data in made) / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m corpus.pictures.build DIR (the folder that holds the unpacked packages)")
    main(Path(sys.argv[1]))
