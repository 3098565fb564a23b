import unicodedata
from collections import Counter

import pytest

from lowtide.data.character_kinds import KINDS, all_characters, make_split


@pytest.fixture(scope="module")
def split():
    return make_split(800, 400, seed=0)


def test_kinds_and_names_are_those_of_the_unicode_database(split):
    first_letter = {"letter": "L", "number": "N", "punctuation": "P", "symbol": "S"}
    for character in split[0] + split[1]:
        assert unicodedata.category(character.text)[0] == first_letter[character.kind]
        assert unicodedata.lookup(character.name.upper()) == character.text


def test_no_held_out_name_begins_with_a_word_that_a_training_name_begins_with(split):
    train, held_out = split
    assert not {character.family for character in train} & {character.family for character in held_out}


def test_every_kind_occurs_equally_often_and_nothing_twice(split):
    for characters, count in zip(split, (200, 100), strict=True):
        assert Counter(character.kind for character in characters) == dict.fromkeys(KINDS, count)
        assert len({character.text for character in characters}) == len(characters)


def test_a_count_that_the_kinds_do_not_divide_differs_by_one_at_most():
    train, _ = make_split(10, 4)
    assert sorted(Counter(character.kind for character in train).values()) == [2, 2, 3, 3]


def test_the_seed_decides_the_split():
    assert make_split(40, 40, seed=3) == make_split(40, 40, seed=3)
    assert make_split(40, 40, seed=3) != make_split(40, 40, seed=4)


def test_rows_are_a_question_and_its_kind(split):
    character = split[0][0]
    assert character.row() == {
        "prompt": f'What kind of character is "{character.name}"? Answer:',
        "completion": f" {character.kind}",
    }


def test_names_that_are_only_numbers_are_left_out():
    names = [character.name for character in all_characters()]
    assert not [name for name in names if name.startswith(("cjk unified", "hangul syllable"))]


def test_more_than_there_are_is_refused_with_what_is_possible():
    with pytest.raises(ValueError, match=r"num_held_out must be at most \d+"):
        make_split(8, 10**6)
