"""CIDEr-D and BLEU-4 of captions, on the words that COCO's evaluation counts.

Equal to pycocoevalcap, which states no licence and brings Java programs of 100 MB.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

# The n-grams of a text with their counts, by n - 1.
Ngrams = Sequence[Mapping[tuple[str, ...], int]]
LONGEST = 4


def ngrams(words: Sequence[str]) -> Ngrams:
    return [Counter(zip(*(words[start:] for start in range(n)), strict=False)) for n in range(1, LONGEST + 1)]


def cider(found: Sequence[Ngrams], truth: Sequence[Sequence[Ngrams]]) -> list[float]:
    """CIDEr-D of each (https://arxiv.org/abs/1411.5726): n-grams weighted by how few pictures' captions have them."""
    pictures: Counter[tuple[str, ...]] = Counter()
    for some in truth:
        pictures.update({ngram for one in some for counts in one for ngram in counts})
    total = math.log(len(truth))

    def weighted(one: Ngrams) -> list[dict[tuple[str, ...], float]]:
        return [
            {ngram: count * (total - math.log(max(1, pictures[ngram]))) for ngram, count in counts.items()}
            for counts in one
        ]

    def similarity(mine: Ngrams, other: Ngrams) -> float:
        values = []
        for one, two in zip(weighted(mine), weighted(other), strict=True):
            lengths = math.sqrt(sum(value**2 for value in one.values()) * sum(value**2 for value in two.values()))
            shared = sum(min(value, two[ngram]) * two[ngram] for ngram, value in one.items() if ngram in two)
            values.append(shared / lengths if lengths else 0.0)
        # A caption as long as the true one loses nothing; the length is that of its pairs, as in the original.
        gap = sum(mine[1].values()) - sum(other[1].values())
        return 10 * sum(values) / LONGEST * math.exp(-(gap**2) / (2 * 6.0**2))

    return [sum(similarity(one, other) for other in some) / len(some) for one, some in zip(found, truth, strict=True)]


def bleu_parts(found: Ngrams, truth: Sequence[Ngrams]) -> list[float]:
    """What one caption adds to BLEU-4 of its set, (10,): n-grams shared with a true one and n-grams, of 1 to 4 words
    each; and its length, and the nearest true one's."""
    shared, said = [], []
    for n, counts in enumerate(found):
        most: Counter[tuple[str, ...]] = Counter()
        for other in truth:
            most |= Counter(other[n])
        shared.append(sum(min(count, most[ngram]) for ngram, count in counts.items()))
        said.append(sum(counts.values()))
    lengths = (sum(other[0].values()) for other in truth)
    return [*shared, *said, said[0], min(lengths, key=lambda other: (abs(other - said[0]), other))]


def bleu(parts: np.ndarray) -> np.ndarray:
    """Sums of bleu_parts (…, 10) → BLEU-4 of a set (…) (https://aclanthology.org/P02-1040).

    With the small numbers that pycocoevalcap adds, which matter only where nothing is shared.
    """
    shared, said, length, nearest = parts[..., :4], parts[..., 4:8], parts[..., 8], parts[..., 9]
    precision = np.prod((shared + 1e-15) / (said + 1e-9), axis=-1) ** (1 / LONGEST)
    ratio = (length + 1e-15) / (nearest + 1e-9)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


# What the tokenizer of COCO's captions, Stanford's PTBTokenizer, makes of English; see `tokens`.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = {*".?!,:;-–—'`\"‘’“”", "--", "...", "…", "''", "``"}
_ABBREVIATED = "mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|co|corp|ltd|ave|blvd|prof|gen|rev|sgt|capt|no"
_TOKEN = re.compile(
    rf"""
    [\w.+-]+@[\w-]+(?:\.[\w-]+)+                # e-mail
    | https?://\S+ | www\.\S+
    | (?:[^\W\d_]\.){{2,}}                      # a.m.
    | (?:{_ABBREVIATED})\.(?=\s|$)
    | '(?:n'|em|tis|twas|cause|til|bout|\d\ds\b)  # 'n', '80s
    | n't\b | '(?:s|re|ve|ll|d|m)\b
    | \d+(?:[.,:/]\d+)*(?:-?[^\W\d_]+)*\d*(?:-\w+)*
    | (?:y'(?=all\b)|can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|gim(?=me\b)|lem(?=me\b))
    | (?<=gon)na\b|(?<=wan)na\b|(?<=got)ta\b|(?<=gim)me\b|(?<=lem)me\b|(?<=can)not\b
    | [^\W\d_]+?(?=n't\b)
    | \w+(?:[-&/.]\w+)*(?:'(?!(?:s|re|ve|ll|d|m|t)\b)\w+)*
    | \.\.\. | --+ | [?!]{{2,}} | ''|`` | \S
    """,
    re.VERBOSE,
)


def tokens(caption: str) -> list[str]:
    """The words of a caption as COCO's evaluation counts them: in lower case, contractions in their parts, without
    punctuation, though brackets stay, as -lrb- and the like.

    Stanford's PTBTokenizer, which COCO uses, needs Java. The tests compare with it.
    """
    found = (_BRACKETS.get(token, token) for token in _TOKEN.findall(caption.lower().replace("’", "'")))
    return [token for token in found if token not in _DROPPED and token.strip("-")]
