"""Download RULER's source files from where NVIDIA's repository says: essays, SQuAD, HotpotQA, a list of words.

python tools/fetch_ruler_data.py --out data/ruler

What is there already stays.  The essays are gathered by NVIDIA's own script, which needs html2text and beautifulsoup4.
Then: python tools/evaluate.py --suite ruler --haystack data/ruler/PaulGrahamEssays.json --squad ... --hotpotqa ...
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli

PLACE = "NVIDIA/RULER/c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a/scripts/data/synthetic/json"
RAW, LARGE = f"https://raw.githubusercontent.com/{PLACE}", f"https://media.githubusercontent.com/media/{PLACE}"
HOTPOTQA = "hotpot_dev_distractor_v1.json"
FILES = {  # name: SHA-256 where it is known, addresses to try in turn
    "squad.json": (None, ["https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"]),
    "hotpotqa.json": (
        None,
        [
            f"http://curtis.ml.cmu.edu/datasets/hotpot/{HOTPOTQA}",
            "https://huggingface.co/datasets/namlh2004/hotpotqa/resolve/"
            f"7e54db4656209750ff487f6fdf8e39a66dba136b/{HOTPOTQA}",
        ],
    ),
    "english_words.json": (
        "affcd6d45fdf3cc843d585c99c97ad615094e760e6c4756b654bab6c73bc2eca",
        [f"{LARGE}/english_words.json"],
    ),
}
SCRIPT = "download_paulgraham_essay.py"
ESSAYS, ESSAY_FILES = (
    "PaulGrahamEssays.json",
    {
        SCRIPT: ("d89622edfe08d4011718bb2634da742d69a56728139fa5e236e00cca703cc84c", [f"{RAW}/{SCRIPT}"]),
        "PaulGrahamEssays_URLs.txt": (
            "9862c06b4303b7bb6fe4c4a88671c51d2d36ec65757db54730c703d9cf474099",
            [f"{RAW}/PaulGrahamEssays_URLs.txt"],
        ),
    },
)


def fetch(out: Path, checksum: str | None, addresses: list[str]) -> None:
    """Save the first address that answers as `out`, whole and with the right checksum, or raise InputError."""
    import shutil
    import urllib.request

    from endprompt_megatron.common.packages import verify

    partial, failures = out.with_name(f".{out.name}.partial"), []
    try:
        for address in addresses:
            try:
                with urllib.request.urlopen(address, timeout=60) as source, open(partial, "wb") as target:
                    shutil.copyfileobj(source, target)
            except OSError as error:
                failures.append(f"{address}: {error}")
                continue
            if checksum is not None:
                verify(partial, checksum)
            partial.rename(out)
            return
        raise InputError(f"{out.name} cannot be downloaded ({'; '.join(failures)})")
    finally:
        partial.unlink(missing_ok=True)


def gather_essays(out: Path) -> None:
    """Run NVIDIA's script beside its list of addresses; what it could not get it says, and goes on."""
    with tempfile.TemporaryDirectory(dir=out.parent) as directory:
        for name, (checksum, addresses) in ESSAY_FILES.items():
            fetch(Path(directory) / name, checksum, addresses)
        done = subprocess.run([sys.executable, SCRIPT], cwd=directory, stdout=subprocess.PIPE, text=True)
        if done.returncode or not (Path(directory) / ESSAYS).is_file():
            raise InputError(f"{ESSAYS}: NVIDIA's script failed, see above; pip install html2text beautifulsoup4 tqdm")
        print(done.stdout, end="")
        failed = done.stdout.count("Fail download")
        if failed:
            print(f"{ESSAYS}: {failed} essays are missing, see above: another haystack than RULER's", file=sys.stderr)
        (Path(directory) / ESSAYS).rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the files go here")
    parser.add_argument("--dry-run", action="store_true", help="print what would be downloaded")
    args = parser.parse_args()

    from endprompt_megatron.common.files import disk_errors

    if not args.dry_run:
        with disk_errors(args.out, "--out"):
            args.out.mkdir(parents=True, exist_ok=True)
    for name, (checksum, addresses) in {**FILES, ESSAYS: (None, [ESSAY_FILES[SCRIPT][1][0]])}.items():
        there = (args.out / name).is_file()
        print(f"{args.out / name}: {'is there already' if there else 'from ' + ' or '.join(addresses)}")
        if args.dry_run or there:
            continue
        with disk_errors(args.out, "--out"):
            gather_essays(args.out / name) if name == ESSAYS else fetch(args.out / name, checksum, addresses)


if __name__ == "__main__":
    run_cli(main)
