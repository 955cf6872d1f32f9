"""What the captions of the 128-pixel set say: an emoji's kind, and three levels of caption.

    exact   '3d emoji of a red apple'
    kind    '3d emoji of a fruit'
    style   '3d emoji'

Each level may also name the background: '… on a blue background'. An image that was drawn on white
has no such words. So one image has a caption of every level, and a caption of a higher level stands
for many images.
"""

from __future__ import annotations

# A kind, and the Unicode subgroups that belong to it (the package emoji.json has a subgroup for
# each emoji). Unicode's own names are no words for a caption: 'food-fruit', 'place-other'.
_KINDS = """
a smiling face: face-smiling, face-affection, face-tongue
a thinking face: face-hand, face-neutral-skeptical
a tired face: face-sleepy, face-unwell
a dressed up face: face-hat, face-glasses
a sad face: face-concerned
an angry face: face-negative
a monster: face-costume
a cat face: cat-face
a monkey: monkey-face
a heart: heart
a feeling: emotion
a hand: hand-fingers-open, hand-fingers-partial, hand-single-finger, hand-fingers-closed
hands: hands, hand-prop
a body part: body-parts
a person: person
a person with a gesture: person-gesture
a person at work: person-role
a fantasy person: person-fantasy
a person in motion: person-activity
an athlete: person-sport
a resting person: person-resting
people: family, person-symbol
a mammal: animal-mammal
a bird: animal-bird
a reptile: animal-amphibian, animal-reptile
a sea animal: animal-marine, food-marine
an insect: animal-bug
a flower: plant-flower
a plant: plant-other
a fruit: food-fruit
a vegetable: food-vegetable
a dish: food-prepared, food-asian
a dessert: food-sweet
a drink: drink
a kitchen tool: dishware, household
a place: place-map, place-geographic, place-other
a building: place-building, place-religious
a vehicle: transport-ground
a boat: transport-water
an aircraft: transport-air
a clock: time, hotel
weather: sky & weather
a celebration: event
a medal: award-medal
a ball: sport
a game: game
an art: arts & crafts
clothing: clothing
a sound: sound, music
a musical instrument: musical-instrument
a phone: phone
a computer: computer
a camera: light & video
a book: book-paper
money: money, currency
mail: mail
a pen: writing
an office supply: office
a lock: lock
a tool: tool, science, medical
an object: other-object
a sign: transport-sign, warning, other-symbol, av-symbol, punctuation, math, gender
an arrow: arrow
a religious symbol: religion
a zodiac sign: zodiac
a letter: keycap, alphanum
a shape: geometric
a flag: flag, country-flag, subdivision-flag
"""
# Kinds whose mirror image shows the same thing. No kind with letters, digits, arrows or flags.
_MIRRORED = """
a smiling face; a thinking face; a tired face; a dressed up face; a sad face; an angry face
a monster; a cat face; a monkey; a heart; a person; a person with a gesture; a person at work
a fantasy person; a person in motion; an athlete; a resting person; people; a mammal; a bird
a reptile; a sea animal; an insect; a flower; a plant; a fruit; a vegetable; a dish; a dessert
a drink; a kitchen tool; a building; a vehicle; a boat; an aircraft; a ball; clothing
a musical instrument; a tool
"""
# Concepts with one of these words are never mirrored: a side, or letters in the picture.
_ONE_WAY = """
left right clockwise facing index hotel hospital bank post office store ambulance police taxi bus
stop question zzz symbols
"""
COLOURS = ("blue", "green", "yellow", "pink", "purple", "gray")
STYLES = ("3d", "flat", "noto", "twemoji")
LEVELS = ("exact", "kind", "style")  # in the order of levels()


def _kind_by_subgroup() -> dict[str, str]:
    kinds = {}
    for line in _KINDS.strip().splitlines():
        kind, subgroups = line.split(": ")
        for subgroup in subgroups.split(", "):
            kinds[subgroup] = kind
    return kinds


KIND_BY_SUBGROUP = _kind_by_subgroup()
KINDS = tuple(dict.fromkeys(KIND_BY_SUBGROUP.values()))
_MIRRORED_KINDS = {kind.strip() for kind in _MIRRORED.replace("\n", ";").split(";")} - {""}
_ONE_WAY_WORDS = set(_ONE_WAY.split())


def may_mirror(concept: str, kind: str) -> bool:
    """Whether an emoji's mirror image still shows what its captions say."""
    return kind in _MIRRORED_KINDS and not _ONE_WAY_WORDS & set(concept.split())


def with_article(concept: str) -> str:
    """'red apple' -> 'a red apple'; plurals take no article."""
    plural = concept.endswith("s") and not concept.endswith(("ss", "us", "is"))
    article = "" if plural else "an " if concept[0] in "aeiou" else "a "
    return article + concept


def exact_caption(style: str, concept: str) -> str:
    """'3d', 'red apple' -> '3d emoji of a red apple'."""
    return f"{style} emoji of {with_article(concept)}"


def kind_caption(style: str, kind: str) -> str:
    """'3d', 'a fruit' -> '3d emoji of a fruit'."""
    return f"{style} emoji of {kind}"


def style_caption(style: str) -> str:
    """'3d' -> '3d emoji'."""
    return f"{style} emoji"


def on_background(caption: str, colour: str) -> str:
    """The caption with the background's colour; '' stands for white, which is not named."""
    return f"{caption} on a {colour} background" if colour else caption


def levels(style: str, concept: str, kind: str, colour: str = "") -> tuple[str, str, str]:
    """The exact, kind and style caption of one image."""
    captions = exact_caption(style, concept), kind_caption(style, kind), style_caption(style)
    exact, of_kind, of_style = (on_background(caption, colour) for caption in captions)
    return exact, of_kind, of_style
