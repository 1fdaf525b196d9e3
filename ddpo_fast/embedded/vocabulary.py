"""What the embedded model can draw and its scorer can recognise: 45 animals and 79 further subjects."""

ANIMALS = tuple(
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant butterfly "
    "fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla "
    "hedgehog kangaroo".split()
)  # the 45 nouns of DDPO's `simple_animals` prompts
OTHERS = (
    "elephant", "giraffe", "penguin", "owl", "panda", "koala", "snail", "octopus", "crocodile", "lobster", "hippopotamus",
    "crab", "rhinoceros", "leopard", "unicorn", "dragon", "parrot", "swan", "peacock", "flamingo", "eagle", "sloth",
    "otter", "seal", "hamster", "skunk", "scorpion", "polar bear", "rooster",
    "apple", "banana", "strawberry", "lemon", "pineapple", "watermelon", "cherry", "carrot", "pizza", "hamburger", "cake",
    "ice cream", "cookie", "doughnut", "sandwich",
    "car", "bus", "bicycle", "airplane", "rocket", "sailboat", "train", "tractor", "truck", "helicopter",
    "tree", "palm tree", "cactus", "sunflower", "rose", "tulip", "mushroom",
    "house", "castle", "guitar", "umbrella", "clock", "book", "balloon", "key", "star", "sun", "moon", "snowman", "cup",
    "hat", "shoe", "chair", "soccer ball", "light bulb",
)  # fmt: skip
SUBJECTS = ANIMALS + OTHERS

# Keys of the emoji that show a subject, if they are not just the subject's name.
EMOJI_KEYS = {name: (name, f"{name}-face") for name in "cat dog horse monkey rabbit cow tiger mouse pig dragon".split()} | {
    "sheep": ("ewe", "ram"),
    "beetle": ("beetle", "lady-beetle"),
    "fish": ("fish", "tropical-fish"),
    "whale": ("whale", "spouting-whale"),
    "squirrel": ("chipmunk",),
    "bee": ("honeybee",),
    "camel": ("camel", "two-hump-camel"),
    "bird": ("bird",),
    "apple": ("red-apple", "green-apple"),
    "cherry": ("cherries",),
    "cake": ("birthday-cake", "shortcake"),
    "ice cream": ("ice-cream", "soft-ice-cream"),
    "car": ("automobile", "sport-utility-vehicle"),
    "airplane": ("airplane", "small-airplane"),
    "train": ("locomotive",),
    "truck": ("delivery-truck", "articulated-lorry"),
    "tree": ("deciduous-tree", "evergreen-tree"),
    "house": ("house", "house-with-garden"),
    "umbrella": ("umbrella", "closed-umbrella"),
    "clock": ("alarm-clock", "mantelpiece-clock"),
    "book": ("closed-book", "blue-book"),
    "key": ("key", "old-key"),
    "moon": ("crescent-moon",),
    "snowman": ("snowman", "snowman-without-snow"),
    "cup": ("hot-beverage", "teacup-without-handle"),
    "hat": ("top-hat", "womans-hat"),
    "shoe": ("running-shoe", "mans-shoe"),
}
TEMPLATES = ("{name}", "{article} {name}", "{article} {name}.", "a picture of {article} {name}")


def caption(name: str, template: str = TEMPLATES[0]) -> str:
    """Fill a template: caption("ant", "{article} {name}") == "an ant"."""
    return template.format(name=name, article="an" if name[0] in "aeiou" and not name.startswith("uni") else "a")
