"""Synthetic filler for retrieval tasks: a repeated noise passage, essay-like text, and words."""

from __future__ import annotations

import numpy as np

NOISE = "The hills are quiet. The river is wide. The road is long. Off we walk. Out and home again."
"""One unit of the repeated haystack: says nothing, and says the same each time."""

ADJECTIVES = tuple(
    """able amber ancient bitter bold brave brief bright brisk broad calm careful cheerful clever
    cold cosmic crisp curious curly dark deep eager early easy elder empty faint famous fast
    fierce final fine firm flat fresh gentle giant glad golden grand grave green happy hardy
    heavy hidden hollow honest humble hungry icy idle jolly keen kind large late lazy light
    little lively lonely loud loyal lucky mellow merry mighty mild misty modern modest narrow
    neat noble odd olive pale patient plain playful polite proud purple quick quiet rapid rare
    rough round royal rustic sandy secret sharp shiny shy silent silver simple sleepy slim
    slow smooth soft solid steady stern still strange strong sturdy subtle sudden sunny sweet
    swift tall tender tidy tiny vast velvet warm wild wise witty wooden young""".split()
)
NOUNS = tuple(
    """acorn actor anchor apple arrow artist attic author badge baker balcony banjo barrel basket
    beacon blanket bottle branch bridge broom bucket button cabin cactus camera candle canvas
    carpet castle chapel cherry circus clock cloud compass copper cottage cradle crystal
    curtain dancer desert diamond doctor dragon drawer engine falcon farmer feather fiddle
    finger flower forest fountain galaxy garden garlic giraffe glacier goblet guitar hammer
    harbor helmet hermit honey island jacket jasmine jungle kettle kitten ladder lantern lemon
    letter library lizard magnet maple marble market meadow mirror monkey museum mustard
    needle oasis office orange orchard otter oyster painter palace parrot pencil pepper piano
    pillow pirate planet pocket potato pumpkin puzzle rabbit raven ribbon robin rocket saddle
    sailor salmon school shadow shovel singer spider spoon squirrel stable statue stone summer
    teacher temple thistle ticket tiger timber tomato tower trumpet tunnel turtle valley
    vessel village violin walnut whistle widow window winter wizard zebra""".split()
)
VERBS = tuple(
    """admired answered asked borrowed brought built carried changed cleaned copied counted
    described discovered drew finished followed forgot found guarded helped ignored imagined
    improved kept lifted measured mended moved noticed opened ordered painted planned praised
    pulled pushed reached repaired returned saved searched sheltered sold studied taught
    traced trusted visited wanted washed watched weighed welcomed""".split()
)

_SENTENCES = (
    "The {a} {n} {v} the {m} before anyone else was awake.",
    "Most people who {v} a {n} say that it was less {a} than they had expected.",
    "It is hard to say why a {n} should be more {a} than a {m}.",
    "When I was at school I {v} a {n}, and I still think about it.",
    "What matters in the end is not the {n} but the {a} habit behind it.",
    "A friend of mine {v} the same {n} for years without seeing how {a} it was.",
    "There is a {a} kind of work that looks like play, and the {n} is one example.",
    "If you only have a {n}, every problem begins to look like a {m}.",
    "Nobody {v} the {n} at first, perhaps because it seemed too {a} to be useful.",
    "The best way to learn about a {n} is to ask someone who once {v} it.",
    "In a {a} town even the {n} has a story, though few people tell it.",
    "So the {n} stayed where it was, and the {m} grew {a} with time.",
    "Good ideas are like a {a} {n}: easy to miss, and hard to give up.",
    "We {v} the {n} again the next day, this time with a {a} plan.",
)

_SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")


def noise(units: int) -> list[str]:
    """The noise passage, repeated."""
    return [NOISE] * units


def essay(units: int, rng: np.random.Generator) -> list[str]:
    """Sentences in an essay's tone; a longer essay begins with the shorter one's sentences."""

    def pick(words: tuple[str, ...]) -> str:
        return words[rng.integers(len(words))]

    return [
        pick(_SENTENCES).format(a=pick(ADJECTIVES), n=pick(NOUNS), m=pick(NOUNS), v=pick(VERBS))
        for _ in range(units)
    ]


def names(count: int, rng: np.random.Generator) -> list[str]:
    """Distinct "adjective-noun" names, at most as many as there are pairs."""
    pairs = rng.permutation(len(ADJECTIVES) * len(NOUNS))[:count]
    return [f"{ADJECTIVES[p // len(NOUNS)]}-{NOUNS[p % len(NOUNS)]}" for p in pairs.tolist()]


def vocabulary(rng: np.random.Generator) -> list[str]:
    """Every listed word, shuffled."""
    listed = sorted({*ADJECTIVES, *NOUNS, *VERBS})
    return [listed[i] for i in rng.permutation(len(listed))]


def invented(count: int, rng: np.random.Generator) -> list[str]:
    """Distinct words made of four syllables, for when the listed ones run out."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(_SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=4))] = None
    return list(found)
