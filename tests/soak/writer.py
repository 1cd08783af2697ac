"""Writes one file again and again until it is killed: what kills.py and the short tests kill.   writer.py FILE [BYTES]

The content is one byte, repeated: a file that holds two different ones, or fewer, is torn. No torch, so that hundreds
start in a minute.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lora_merge"))

from disk.whole import write_whole

PIECES = 64


def main() -> None:
    path, size = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4_000_000
    for number in itertools.count():
        piece = bytes([number % 256]) * (size // PIECES)

        def write(file, piece=piece):
            for _ in range(PIECES):
                file.write(piece)

        write_whole(path, write, lambda path: None)
        print(number, flush=True)


if __name__ == "__main__":
    main()
