"""Self-made sources for RULER in the layouts of the published ones, the same on every machine.

    python tests/ruler_files.py DIR

writes essays.json, squad.json, hotpotqa.json, english_words.json, punkt/ and tokenizer/ into DIR.
"""

import json
import random
import string
import sys
from pathlib import Path

WORDS = (
    "the of and a to in is was he for it with as his on be at by had not are but from or have an they which one you "
    "were her all she there would their we him been has when who will more no if out so said what up its about than "
    "into them can only other time new some could these two may first then do any like my now over such our man me "
    "even most made after also did many off before must well back through years much where your way down should "
    "because long each just state people too mr good world dr work st approx e.g life city house river market"
).split()


def write_all(directory: Path) -> Path:
    """Everything that RulerSettings and NVIDIA's scripts read, and a tokenizer; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    _write(directory / "essays.json", {"text": "\n\n".join(paragraph(rng, 40) for _ in range(90))})
    _write(directory / "squad.json", squad(rng, articles=30))
    _write(directory / "hotpotqa.json", hotpotqa(rng, records=40))
    letters = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 11))) for _ in range(40_000)]
    _write(directory / "english_words.json", {str(number): word for number, word in enumerate(letters)})
    punkt(directory / "punkt")
    tokenizer(directory / "tokenizer")
    return directory


def settings(directory: Path) -> dict:
    """The fields of RulerSettings that name these files."""
    named = {"haystack": "essays.json", "squad": "squad.json", "hotpotqa": "hotpotqa.json", "punkt": "punkt"}
    return {key: directory / name for key, name in named.items()} | {"english_words": directory / "english_words.json"}


def sentence(rng: random.Random) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randint(4, 18))]
    words = [word + "." if word in ("mr", "dr", "st", "approx", "e.g") else word for word in words]
    return " ".join(words).capitalize() + rng.choice(".....?!") + rng.choice(("", "", "", '"', " (1995)."))


def paragraph(rng: random.Random, sentences: int) -> str:
    return "  ".join(sentence(rng) for _ in range(sentences)).replace(" man ", "\nman ")


def squad(rng: random.Random, articles: int) -> dict:
    """dev-v2.0.json: articles with paragraphs, among their questions some without an answer."""

    def qa(context: str) -> dict:
        words = context.split()
        answers = [" ".join(words[at : at + 2]) for at in (rng.randrange(len(words) - 2) for _ in range(3))]
        return {
            "question": sentence(rng).rstrip(".!") + "?",
            "id": str(rng.getrandbits(60)),
            "answers": [{"text": answer, "answer_start": context.find(answer)} for answer in answers],
            "is_impossible": rng.random() < 0.4,
        }

    def record(number: int) -> dict:
        contexts = [paragraph(rng, rng.randint(3, 9)) for _ in range(rng.randint(3, 14))]
        made = [{"context": context, "qas": [qa(context) for _ in range(rng.randint(1, 4))]} for context in contexts]
        return {"title": f"Article_{number}", "paragraphs": made}

    return {"version": "v2.0", "data": [record(number) for number in range(articles)]}


def hotpotqa(rng: random.Random, records: int) -> list:
    """hotpot_dev_distractor_v1.json: ten paragraphs a question, [title, sentences]; some stand in several."""
    pool = [
        [f"Title {number}", [sentence(rng) + " " for _ in range(rng.randint(1, 6))]] for number in range(6 * records)
    ]
    return [
        {"_id": str(number), "question": sentence(rng), "answer": rng.choice(WORDS), "context": rng.sample(pool, 10)}
        for number in range(records)
    ]


def punkt(directory: Path) -> Path:
    """A Punkt model in the form of NLTK's punkt_tab/english."""
    directory.mkdir(exist_ok=True)
    files = {
        "abbrev_types.txt": "mr\ndr\nst\ne.g\n",
        "collocations.tab": "##number##\tpeople\n",
        "sent_starters.txt": "he\nshe\nthey\n",
        "ortho_context.tab": "he\t46\nthe\t110\nman\t32\ncity\t40\n",
    }
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def tokenizer(directory: Path) -> Path:
    """A byte-level BPE tokenizer whose merges are written down, not trained: a letter and the one before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<|begin|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = string.ascii_letters
    merges = [("Ġ", letter) for letter in letters]
    merges += [(first, second) for first in letters for second in string.ascii_lowercase]
    merges += [(f"Ġ{first}", second) for first in letters for second in string.ascii_lowercase]
    pieces += [first + second for first, second in merges]
    model = models.BPE({piece: number for number, piece in enumerate(pieces)}, merges)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=pieces[0], eos_token=pieces[1])
    fast.save_pretrained(directory)
    return directory


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
