"""Parsed captions that the references' file of hard negatives holds, so that tests need no parser."""

from flair_jax.data.prepare import parses


def parse_of(record: dict) -> parses.Parse:
    tokens = [
        parses.Token(*(token[name] for name in ("text", "idx", "pos", "tag", "dep", "head", "lemma")))
        for token in record["tokens"]
    ]
    chunks = [parses.Span(chunk["start"], chunk["end"], chunk["root"]) for chunk in record["noun_chunks"]]
    return parses.Parse(record["caption"], tokens, chunks)


def nothing(text: str, pos: str, tag: str) -> parses.Candidates:
    return parses.Candidates.of({})
