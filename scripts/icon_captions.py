"""What is said of an icon: natural labels, articles, everyday names and captions, from Unicode's names and keywords.

A caption is only worth as much as it is true of the very drawing it stands under. So keywords that name a colour are
left out (they are Unicode's: "black sun with rays" is yellow nearly everywhere), and in the black-and-white style the
colours it cannot show are taken out of labels too ("red apple" is "apple" there). And it is worth little if it is the
name of another drawing: a rabbit's face is no "rabbit" in a set that has a whole one.
"""

import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence

COLOURS = (
    "red|orange|yellow|green|blue|purple|violet|pink|brown|grey|gray|gold|golden|silver|bronze|blond|blonde|brunette|"
    "redhead|cyan|magenta|turquoise|colou?r|colou?red|colou?rful|multicolou?red"
)
SHOWN_IN_MONO = "black|white"  # the two colours a black-and-white drawing does show
COLOUR_PHRASE = re.compile(rf"\b(?:(?:light|dark|bright) )?(?:{COLOURS})\b[ -]?", re.IGNORECASE)
COLOURED_HAIR = re.compile(rf" with (?:{COLOURS}) hair\b", re.IGNORECASE)
ANY_COLOUR = re.compile(rf"\b(?:{COLOURS}|{SHOWN_IN_MONO})\b", re.IGNORECASE)

# Keywords left over from old character names ("heavy black heart", "white medium star"), which show nothing.
EMPTY_WORDS = frozenset({"heavy", "medium", "neutral", "outlined", "side", "sign", "small", "bae", "bro"})

# Unicode's label -> the same thing as one would say it. Patterns follow in natural_label.
SPOKEN = {
    "1st place medal": "first place medal",
    "2nd place medal": "second place medal",
    "3rd place medal": "third place medal",
    "backhand index pointing down": "hand pointing down",
    "backhand index pointing left": "hand pointing left",
    "backhand index pointing right": "hand pointing right",
    "backhand index pointing up": "hand pointing up",
    "breast-feeding": "woman breast-feeding",
    "bust in silhouette": "silhouette of a person",
    "busts in silhouette": "silhouette of two people",
    "chart decreasing": "falling chart",
    "chart increasing": "rising chart",
    "chart increasing with yen": "rising chart with yen sign",
    "foggy": "foggy bridge",
    "hourglass done": "hourglass",
    "hourglass not done": "hourglass with flowing sand",
    "index pointing at the viewer": "finger pointing at the viewer",
    "index pointing up": "finger pointing up",
    "joker": "joker card",
    "leafy green": "leafy vegetable",
    "locked": "padlock",
    "locked with key": "padlock with key",
    "locked with pen": "padlock with pen",
    "magnifying glass tilted left": "magnifying glass",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "speaker high volume": "speaker at high volume",
    "speaker low volume": "speaker at low volume",
    "speaker medium volume": "speaker at medium volume",
    "star-struck": "star-struck face",
    "unlocked": "open padlock",
    "mate": "cup of mate",
    "ZZZ": "zzz",
}


def _table(text: str) -> dict[str, tuple[str, ...]]:
    rows = (line.split(": ") for line in text.strip().splitlines())
    return {label: tuple(names.split(", ")) for label, names in rows}


# Natural label -> what most people would type for it. Only names that fit the drawing as well as the label does.
EVERYDAY = _table("""
airplane: plane
articulated lorry: semi truck, truck
automobile: car
baguette bread: baguette
beer mug: beer
bicycle: bike
billed cap: cap
birthday cake: cake
bouquet: bouquet of flowers
bullseye: dartboard, target
cat face: cat
cheese wedge: cheese
closed book: book
cloud with lightning: thunderstorm
cloud with rain: rain cloud
cloud with snow: snow cloud
collision: explosion
computer disk: minidisc
cooked rice: bowl of rice
couch and lamp: sofa, couch
cow face: cow
crescent moon: moon
cut of meat: steak
deciduous tree: tree
delivery truck: truck
desktop computer: computer
dog face: dog
doughnut: donut
dragon face: dragon head
drop of blood: blood drop
droplet: water drop
ear of corn: corn
enraged face: angry face
evergreen tree: pine tree, tree
face with tears of joy: laughing face
film projector: projector
fire: flame
fire engine: fire truck
flag in hole: golf flag
flying saucer: ufo
four leaf clover: clover
fox: fox face
framed picture: painting
french fries: fries
full moon: moon
game die: dice
gem stone: gem, diamond
glass of milk: milk
globe showing Americas: globe, earth
globe showing Asia-Australia: globe, earth
globe showing Europe-Africa: globe, earth
glowing star: shiny star, star
grinning face: happy face, smiley
hamburger: burger
headphone: headphones
high-heeled shoe: high heel
high voltage: lightning bolt
honeybee: bee
horse face: horse head
hot beverage: cup of coffee, coffee
hot pepper: chili pepper
house with garden: house
ice cream: bowl of ice cream
jack-o-lantern: halloween pumpkin, pumpkin
kitchen knife: knife
lady beetle: ladybug
leafy vegetable: lettuce
locomotive: steam train
loudly crying face: sobbing face
man's shoe: shoe
meat on bone: meat
memo: note
mobile phone: phone, smartphone
money bag: bag of money
monkey face: monkey head
motor scooter: scooter
motorcycle: motorbike
mount fuji: mountain
mouse face: mouse head
musical note: music note
office building: building
oncoming automobile: car
oncoming bus: bus
oncoming police car: police car
oncoming taxi: taxi
open book: book
optical disk: cd
panda: panda face
party popper: confetti
performing arts: theatre masks
pick: pickaxe
pig face: pig
pile of poo: poop
police car light: siren
potted plant: plant in a pot
poultry leg: chicken leg
puzzle piece: jigsaw piece
rabbit face: rabbit
racing car: race car
raised hand: hand
red heart: heart
ringed planet: saturn, planet
running shoe: sneaker
sauropod: dinosaur
shortcake: slice of cake
smiling face: smiley
smiling face with smiling eyes: happy face
smiling face with sunglasses: cool face
snow-capped mountain: mountain
soccer ball: football
soft ice cream: ice cream cone
spaghetti: pasta
sport utility vehicle: suv
spouting whale: whale
steaming bowl: bowl of noodles
sun with face: smiling sun
tangerine: orange
telephone receiver: telephone handset
television: tv
T-Rex: dinosaur
tiger face: tiger head
two-hump camel: camel
umbrella with rain drops: umbrella in the rain, umbrella
videocassette: video tape
wastebasket: trash can
water pistol: pistol
water wave: ocean wave
wine glass: glass of wine
woman's boot: boot
woman's clothes: blouse
woman's sandal: sandal
wrapped gift: gift, present
wrench: spanner
""")

PLURALS = {"man": "men", "woman": "women", "child": "children"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
THE_COUNTRY = re.compile(
    r"^(United|Bahamas|Comoros|Isle|European Union|Maldives|Netherlands|Philippines|Seychelles)"
    r"|(Islands|Republic|Territories|Territory|Netherlands)$"
)

WITHOUT_ARTICLE = """
bacon bread broccoli butter candy cheese chocolate coffee confetti coral corn curry custard dna falafel fire flatbread
fog fondue food garlic ginger herb honey ice lettuce liquid luggage meat milk money music oden pasta polish popcorn rail
rice sake salt soap spaghetti sushi thread voltage wood yarn
badminton bowling camping construction cooking fuji hockey lacrosse pong racing tennis
Claus earth saturn Aquarius Aries Cancer Capricorn Gemini Leo Libra Ophiuchus Pisces Sagittarius Scorpio Taurus Virgo
away biohazard claim control copyright divide dizzy entry exchange infinity littering minus mode multiply off om plus
potable prohibited radioactive registered smoking together volume warning wireless yang zzz
"""  # matter, pastimes, names, and words that are no nouns
MASS = frozenset(WITHOUT_ARTICLE.split())
PLURAL_WITHOUT_S = frozenset({"men", "women", "people", "children", "dice", "teeth", "mice", "geese", "skis"})
SINGULAR_WITH_S = re.compile(r"(ss|us|is|os|x-ray|rhinoceros|lens|canvas|gas|atlas)$")
HEAD_ENDS = re.compile(
    r" (?:and|at|behind|but|in|not|of|on|over|under|with|without|blowing|done|exhaling|facing|feeding|fluttering|"
    r"gesturing|getting|holding|lifting|playing(?! cards)|pointing|rolling|savoring|screaming|showing|tilted|"
    r"vomiting|wearing)\b"
)
SPOKEN_U = re.compile(r"^(?:uni|uti|ufo|euro|ewe|one)", re.IGNORECASE)
SPOKEN_VOWEL = re.compile(r"^(?:[aeiou]|hour|suv|x-ray)", re.IGNORECASE)


def natural_label(label: str) -> str:
    """Unicode's label as one would say it: "man: red hair" -> "man with red hair", "flag: Japan" -> "flag of Japan"."""
    label = re.sub('[“”"]', "", label.replace("’", "'")).replace(" & ", " and ")
    if label in SPOKEN:
        return SPOKEN[label]
    if label.endswith(("o'clock", "-thirty")):
        return f"clock showing {label}"
    what, colon, rest = label.partition(": ")
    if not colon:
        return label
    if what == "flag":
        return f"flag of the {rest}" if THE_COUNTRY.search(rest) else f"flag of {rest}"
    if what == "family":
        return f"family of {_people(rest)}"
    if what == "kiss":
        return f"{_people(rest)} kissing"
    if what == "couple with heart":
        return f"{_people(rest)} with a heart"
    if rest == "bald":
        return f"bald {what}"
    return f"{what} {rest}" if rest.startswith("facing") else f"{what} with {rest}"


def _people(listed: str) -> str:
    """ "man, woman, girl, girl" -> "a man, a woman and two girls"."""
    counts = Counter(listed.split(", "))
    spoken = [
        with_article(who) if count == 1 else f"{NUMBERS[count]} {PLURALS.get(who, who + 's')}"
        for who, count in counts.items()
    ]
    return " and ".join([", ".join(spoken[:-1]), spoken[-1]] if len(spoken) > 1 else spoken)


def with_article(name: str) -> str:
    """ "apple" -> "an apple", "unicorn" -> "a unicorn"; plurals, matter, names and activities stay as they are."""
    head = HEAD_ENDS.split(name, maxsplit=1)[0]
    last = head.rsplit(" ", 1)[-1]
    plural = last in PLURAL_WITHOUT_S or (last.endswith("s") and not SINGULAR_WITH_S.search(last))
    counted = name.split(" ", 1)[0] in {"a", "an", "the", "no", "two", "three"}
    if plural or counted or last in MASS or head.split(" ", 1)[0] in PLURAL_WITHOUT_S:
        return name
    if name == "sun" or name.startswith(("sun ", "flag of ", "Statue", "map of", "milky way", "kaaba", "Tokyo")):
        return f"the {name}"
    vowel = SPOKEN_VOWEL.search(name) and not SPOKEN_U.search(name)
    return f"{'an' if vowel else 'a'} {name}"


def without_colours(label: str) -> str:
    """ "red apple" -> "apple", "man with red hair" -> "man"; black and white stay; never empty."""
    bare = COLOUR_PHRASE.sub("", COLOURED_HAIR.sub("", label)).strip()
    return bare or label


def names_colour(text: str) -> bool:
    """Whether a word of the text is a colour."""
    return bool(ANY_COLOUR.search(text))


def keywords(label: str, unicode_words: Sequence[str], other_words: Sequence[str]) -> tuple[str, ...]:
    """Both lists' words without colours, codes and repetitions of the label: first those on which the lists agree."""
    agreed = [word for word in other_words if word in set(unicode_words)]
    said = label.lower()
    words: dict[str, str] = {}  # by singular, so that "animal" and "animals" are one
    for word in [*agreed, *unicode_words, *other_words]:
        says_something = re.fullmatch(r"[a-z][a-z' -]+", word) and word not in EMPTY_WORDS and not names_colour(word)
        if says_something and word.removesuffix("s") not in said:
            words.setdefault(word.removesuffix("s"), word)
    return tuple(words.values())


def everyday_names(label: str, kind: str, mono: bool, taken: Container[str] = ()) -> tuple[str, ...]:
    """What else people call it, at most two: from the table; for things also the label without its colour.

    taken: the labels of other concepts. A name of several that is nobody's label ("globe") is everybody's.
    """
    names = list(EVERYDAY.get(label, ()))
    if kind == "object" and not label.endswith(" heart"):  # "a heart" is the red one, an apple may be green
        names.append(without_colours(label))
    if label.startswith("clock showing"):
        names.append("clock")
    shown = without_colours(label) if mono else label
    free = (name for name in dict.fromkeys(names) if name != shown and name not in taken)
    return tuple(name for name in free if not (mono and names_colour(name)))[:2]


def captions(
    label: str, tags: Sequence[str], kind: str, phrase: str, *, mono: bool = False, taken: Container[str] = ()
) -> tuple[str, ...]:
    """Captions of a picture, the main one first: long and short, with the style in words and without.

    `phrase` names the style ("noto emoji"); `mono` is the black-and-white style; `kind` is object, person, symbol, ...;
    `taken` are the labels of other concepts.
    """
    names = everyday_names(label, kind, mono, taken)
    label = without_colours(label) if mono else label
    spoken = with_article(label)
    said = [
        f"{label}, {phrase}",
        f"{spoken}, {phrase} style",
        f"{label} in {phrase} style",
        f"{phrase} of {spoken}",
        label,
        spoken,
    ]
    if "icon" not in phrase:
        said.append(f"{label} icon, {phrase}")
    if tags:
        said.append(f"{label}, {', '.join(tags[:3])}, {phrase}")
    for name in names:
        spoken = with_article(name)
        said += [f"{name}, {phrase}", f"{spoken}, {phrase} style", f"{phrase} of {spoken}", spoken]
    return unique(said)


def unique(texts: Iterable[str]) -> tuple[str, ...]:
    """In order, each once."""
    return tuple(dict.fromkeys(texts))
