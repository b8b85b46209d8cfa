"""Public releases as training shards: `python -m flair_jax.data.prepare RELEASE --help`; see data/README.md.

Each module imports from those below it:

    annotate  finished shards: parses of their captions, for hard negatives
    parses    a parsed caption as an annotation; spaCy and WordNet
    job       all stages of a preparation, or what an interrupted run left to do
    stages    index the captions, match the images, write the shards
    releases  what each release is: its images, its captions, its records
    rows      caption files as rows of (join key, captions)
    store     rows on disk, found again by their join key in little memory
    inputs    images in tars or in a folder
    pictures  images checked, turned upright, and made smaller
    shards    writing tars and ArrayRecord
    report    what was read, matched, written and skipped
    runner    a stage on Apache Beam; worker: a process of the local runner
    atomic    files that appear whole or not at all
"""
