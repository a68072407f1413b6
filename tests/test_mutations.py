"""The lists of tests/mutations/ follow the tree. Not under trainer/ or pipeline/: a mutation would be caught here."""

from tests.mutations import __main__ as mutations


def test_every_mutation_finds_its_text_and_its_tests() -> None:
    misses = [text for mutation in mutations.mutations() if (text := mutations.miss(mutation))]
    assert not misses, "\n".join(misses)
