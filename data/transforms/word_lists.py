"""Words that `negatives.substitute` exchanges with one another.

Eight lists as SVLC has (Doveh et al. 2023, arXiv:2211.11733); the words are our own choice. Only words of one token are
found in captions; expressions of several are written in their stead.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


WORD_LISTS = {
    "colours": _words(
        "red, green, blue, yellow, white, black, gray, grey, brown, orange, pink, purple, beige, golden, turquoise, "
        "teal, maroon, cream, tan, navy, violet, dark, light, blond, colorful, transparent"
    ),
    "actions": _words(
        "in, on, under, over, near, beside, behind, above, below, against, with, without, of, across, between, next, "
        "holding, carrying, wearing, riding, watching, sitting on, standing on, walking on, lying on, hanging from, "
        "leaning on, looking at, attached to, covered in, covering, eating, pulling, pushing, using, throwing, "
        "catching, chasing, feeding, following, touching, driving, painted on, mounted on, parked on"
    ),
    "sizes": _words(
        "small, big, large, little, tiny, huge, giant, tall, short, long, wide, narrow, thick, thin, high, low, slim, "
        "broad, deep, shallow, heavy, enormous, miniature"
    ),
    "states": _words(
        "young, old, new, clean, dirty, wet, dry, calm, rough, open, closed, full, empty, busy, quiet, bright, cloudy, "
        "clear, hot, cold, warm, fresh, rotten, ripe, sharp, blunt, broken, whole, happy, sad, tired, angry, smooth, "
        "rusty, shiny, bare, muddy, sunny, snowy, crowded"
    ),
    "materials": _words(
        "wooden, metal, plastic, glass, stone, brick, concrete, leather, paper, cardboard, cloth, silver, gold, steel, "
        "iron, copper, marble, ceramic, rubber, cotton, silk, wool, denim, clay, tile, wicker, porcelain"
    ),
    "nouns": _words(
        "man, woman, boy, girl, child, baby, person, people, men, women, dog, cat, horse, cow, sheep, bird, elephant, "
        "bear, zebra, giraffe, car, bus, truck, train, boat, plane, bicycle, motorcycle, taxi, table, chair, bench, "
        "couch, desk, door, window, mirror, sink, plate, bowl, cup, bottle, glass, fork, knife, spoon, pizza, "
        "cake, apple, banana, tree, flower, grass, field, beach, river, lake, sea, mountain, street, road, bridge, "
        "building, house, kitchen, bathroom, room, park, station, ball, hat, shirt, coat, umbrella, bag, phone, "
        "sandwich, bed, computer, laptop, keyboard, clock, sign, fence, wall, kite, towel, basket, vase"
    ),
    "counts": _words("one, two, three, four, five, six, seven, eight, nine, ten, several, many, few"),
    "capitalised counts": _words("One, Two, Three, Four, Five, Six, Seven, Eight, Nine, Ten, Several, Many, Few"),
}
